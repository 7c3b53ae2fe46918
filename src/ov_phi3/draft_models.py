"""The draft model of a `load`: whether its vocabulary fits the model's, and how it is loaded beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import LoadRequest
from ov_phi3.errors import ConfigError
from ov_phi3.kv.layout import KVLayout
from ov_phi3.kv.sizing import KVCachePlan
from ov_phi3.model.info import ModelInfo

if TYPE_CHECKING:
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["draft_request", "read_draft_model"]


def read_draft_model(path: str | os.PathLike[str] | None, info: ModelInfo) -> ModelInfo | None:
    """Read the directory of a draft model and compare its vocabulary with the model's.

    Ids that only pad a vocabulary may differ in number: the draft model's are never drafted, and behind the model's
    nothing is drafted.

    Args:
        path: as given to `load`.
        info: the model that it drafts for.

    Raises:
        ConfigError: a token of one is another one, or none, in the other.
        ModelError: the directory is missing, incomplete, damaged, or of another architecture.
    """
    if path is None:
        return None
    draft = ModelInfo.from_dir(path)
    from ov_phi3.text.detokenizer_graph import DetokenizerGraph  # needs numpy, which the doctor may find missing

    texts, others = (DetokenizerGraph(model.path / "openvino_detokenizer.xml") for model in (info, draft))
    for token in range(max(texts.size, others.size)):
        text, other = texts.token_bytes(token), others.token_bytes(token)
        missing = text and token >= draft.vocab_size
        if text != other or missing:
            raise ConfigError(
                f"draft_model={os.fsdecode(path)!r} has another vocabulary than {info.path.name} ({draft.vocab_size} "
                f"and {info.vocab_size} tokens): token {token} is {_shown(b'' if missing else other)} there and "
                f"{_shown(text)} here. A draft model must have the tokenizer of the model that it drafts for."
            )
    return draft


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "backslashreplace")) if text else "no text"


def draft_request(
    draft: ModelInfo, device: DeviceInfo, properties: Mapping[str, Any], kv: KVCachePlan, concurrency: int
) -> LoadRequest:
    """How a draft model is loaded: its cache holds as many tokens as the model's, as far as its context window goes.

    Args:
        draft: the draft model.
        device: its device.
        properties: OpenVINO properties for it.
        kv: the planned cache of the model.
        concurrency: requests that run at once.
    """
    layout = KVLayout.of(draft, device.kind, properties)
    window = min(kv.context_length, draft.context_length)
    most = concurrency * (-(-window // layout.block_size) + 1)
    blocks = min(-(-kv.num_blocks * kv.layout.block_size // layout.block_size), most)
    return LoadRequest(draft, device, properties, KVCachePlan(layout, blocks, window, paged=True), concurrency)
