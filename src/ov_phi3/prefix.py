"""A prefilled prompt as a value: kept beside the engine, reused by any number of requests, saved to a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.generation.config import GenerationConfig
from ov_phi3.kv import snapshot
from ov_phi3.kv.fingerprint import check_fingerprint
from ov_phi3.load_report import ModelWarning
from ov_phi3.saved import read_saved
from ov_phi3.text.prompt import as_messages, describe_tools
from ov_phi3.text.template import Raw

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.loaded_model import LoadedModel
    from ov_phi3.text.prompt import Prompt
    from ov_phi3.text.tools import Tools

__all__ = ["Prefix", "encode_after", "load_prefix", "prefill"]


class Prefix:
    """The keys and values of the beginning of prompts. Made by `Pipeline.prefill` and `Pipeline.load_prefix`.

    A prefix is a value: a reply that starts from it does not change it, and several can exist at the same time. As long
    as it is referenced, every request on its pipeline that begins with its ids reuses it, also in chats.
    """

    def __init__(self, entry: KVEntry, fingerprint: Mapping[str, str]) -> None:
        self._entry = entry
        self._fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"<Prefix of {len(self)} tokens, {self.nbytes / 2**20:.1f} MiB as {self.dtype}>"

    def __len__(self) -> int:
        return len(self._entry.ids)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The ids, as a copy; int64, shape [tokens]."""
        return np.array(self._entry.ids)

    @property
    def nbytes(self) -> int:
        """Size of the keys and values in bytes; those of a loaded prefix are pages of its file."""
        return self._entry.tensors.nbytes

    @property
    def dtype(self) -> str:
        """Precision of the keys and values: "f32", "f16", "bf16", "u8", ..."""
        return self._entry.tensors.dtype

    @property
    def exact(self) -> bool:
        """Whether they equal the engine's bit for bit: always, since the blocks of its cache are kept as they are."""
        return True

    @property
    def entry(self) -> KVEntry:
        """The ids with their keys and values."""
        return self._entry

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What the keys and values depend on."""
        return self._fingerprint

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the prefix to a file, whole or not at all; returns the size of the file in bytes.

        Raises:
            SnapshotError: it cannot be written.
            TypeError: `path` is not a path.
        """
        return snapshot.write(path, snapshot.Snapshot("prefix", self._fingerprint, self._entry.ids, self._entry))


def prefill(model: LoadedModel, prompt: Prompt, on_prefill: OnPrefill | None = None) -> Prefix:
    """Compute the keys and values of a prompt; see `Pipeline.prefill`."""
    model.engine.require("saves_kv", "prefill")
    tokenizer = model.tokenizer
    messages = as_messages(prompt)
    if messages is None:
        ids = model.encode(prompt)
    else:
        ids = tokenizer.encode_segments(tokenizer.template.beginning(messages))
    model.engine.check_room(GenerationConfig(), len(ids))
    entry = model.engine.prefill(ids, on_prefill)
    model.engine.import_kv(entry)
    return Prefix(entry, model.fingerprint)


def load_prefix(model: LoadedModel, path: str | os.PathLike[str]) -> Prefix:
    """Read a prefix from a file; see `Pipeline.load_prefix`."""
    model.engine.require("saves_kv", "load_prefix")
    saved = read_saved(model, path, "prefix")
    entry = saved.entry
    if not model.engine.import_kv(entry):
        message = (
            f"{os.fspath(path)} was saved with another memory layout of the KV cache (another device, precision, or an "
            "older format): its tokens are prefilled again. Save it again to avoid this."
        )
        warnings.warn(message, ModelWarning, stacklevel=3)
        entry = model.engine.prefill(saved.ids)
        model.engine.import_kv(entry)
    return Prefix(entry, model.fingerprint)


def encode_after(
    model: LoadedModel,
    prompt: Prompt,
    prefix: Prefix | None,
    *,
    continue_final_message: bool = False,
    tools: Tools | None = None,
) -> NDArray[np.int64]:
    """The ids of a prompt, behind those of a prefix if one is given.

    Raises:
        ConfigError: the backend cannot use a prefix, or `continue_final_message` or `tools` with a prompt that is not
            messages.
        SnapshotError: the prefix is of another model.
        PromptError, TemplateError: a prompt that cannot become token ids.
        TypeError: `prefix` is not a `Prefix`.
    """
    if prefix is None:
        return model.encode(prompt, continue_final_message=continue_final_message, tools=tools)
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be a Prefix, as prefill() and load_prefix() return, not {prefix!r}")
    check_fingerprint(prefix.fingerprint, model.fingerprint, "this prefix")
    model.engine.require("saves_kv", "prefix=")
    model.engine.import_kv(prefix.entry)  # it may come from another pipeline with the same model
    before = prefix.entry.ids
    if tools is not None:
        prompt = describe_tools(prompt, model.tokenizer, tools)
    is_user_message = isinstance(prompt, str) and not isinstance(prompt, Raw)
    if not is_user_message or continue_final_message:
        whole = model.encode(prompt, continue_final_message=continue_final_message)
        if np.array_equal(whole[: len(before)], before):
            return whole
    messages = as_messages(prompt)
    tokenizer = model.tokenizer
    if messages is None:
        return np.concatenate([before, whole])
    new = tokenizer.template.following(messages, continue_final_message=continue_final_message)
    return np.concatenate([before, tokenizer.encode_segments(new)])
