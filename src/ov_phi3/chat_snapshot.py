"""A conversation to a snapshot file, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.infer_request import InferRequestBackend
from ov_phi3.errors import SnapshotError
from ov_phi3.kv_cache import KVTensors, KVValue
from ov_phi3.prefix import computed, read_for
from ov_phi3.snapshot import Snapshot, write
from ov_phi3.tokenizer import as_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.chat import Chat
    from ov_phi3.pipeline import Pipeline

__all__ = ["restored", "written"]


def written(path: str | os.PathLike[str], chat: Chat) -> int:
    """Write a conversation between two turns; returns the file's size."""
    state, pipeline = chat._now(), chat._pipeline
    ids = np.array(state.ids, dtype=np.int64)
    conversation = {
        "system": None if state.system is None else state.system["content"],
        "turns": [[turn.user["content"], turn.assistant["content"], list(turn.reply)] for turn in state.turns],
        "overflow": chat.overflow,
        "on_cancel": chat.on_cancel,
        "dropped": state.dropped,
    }
    return write(path, Snapshot("chat", pipeline._identity, ids, _value_of(pipeline, ids), conversation))


def _value_of(pipeline: Pipeline, ids: NDArray[np.int64]) -> KVValue:
    """The keys and values of all ids but the last, which the next turn computes in any case.

    None of them where the engine does not give any out.
    """
    if not isinstance(pipeline._engine(), InferRequestBackend) or len(ids) < 2:
        return KVValue(ids[:0], KVTensors("F16", ()))
    with pipeline._turn() as engine:
        return computed(pipeline, engine, ids[:-1])


def restored(pipeline: Pipeline, path: str | os.PathLike[str]) -> Chat:
    """A conversation from a file, with what of its keys and values this engine can go on from."""
    found = read_for(pipeline, path, "chat", engine=False)
    try:
        chat = _chat(pipeline, found.conversation or {})
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise SnapshotError(f"{os.fspath(path)} is damaged: its conversation is not one of this layout.") from exc
    if list(chat._now().ids) != found.ids.tolist():
        raise SnapshotError(f"{os.fspath(path)} is damaged: its token ids are not those of its conversation.")
    engine = pipeline._engine()
    same_release = found.identity.get("engine") == pipeline._identity["engine"]
    if isinstance(engine, InferRequestBackend) and same_release and len(found.value.ids):
        engine.slots.register(found.value)
        chat._kv = found.value
    return chat


def _chat(pipeline: Pipeline, conversation: Mapping[str, Any]) -> Chat:
    from ov_phi3.chat import Chat, Exchange

    chat = Chat(
        pipeline,
        system=conversation["system"],
        overflow=conversation["overflow"],
        on_cancel=conversation["on_cancel"],
    )
    turns = tuple(
        Exchange(
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
            tuple(as_ids(reply, pipeline.info.vocab_size).tolist()),
        )
        for user, assistant, reply in conversation["turns"]
    )
    if not all(isinstance(m["content"], str) and turn.reply for turn in turns for m in turn.messages):
        raise TypeError("a message is a text, and a reply has ids")
    state = chat._now()
    ids = chat._laid_out(state.head, turns)
    chat._set(replace(state, turns=turns, ids=ids, dropped=int(conversation["dropped"])))
    return chat
