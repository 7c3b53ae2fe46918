"""Saved KV caches and chats of one loaded model: a file that is read is checked against it."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from ov_phi3.chat import Chat
from ov_phi3.conversation import Conversation, TurnEncoder
from ov_phi3.errors import SnapshotError
from ov_phi3.kv import snapshot
from ov_phi3.kv.fingerprint import KEYS_ALONE, check_fingerprint, same_keys
from ov_phi3.text.tools import Tools

if TYPE_CHECKING:
    from ov_phi3.loaded_model import LoadedModel

__all__ = ["load_chat", "read_saved"]

_LOADERS = {"chat": "load_chat", "prefix": "load_prefix"}


def read_saved(
    model: LoadedModel, path: str | os.PathLike[str], kind: str, *, but: Collection[str] = ()
) -> snapshot.Snapshot:
    """A snapshot that belongs to this model and fits its context window.

    Args:
        model: the loaded model.
        path: the file.
        kind: "prefix" or "chat".
        but: parts of the fingerprint that may differ.

    Raises:
        SnapshotError: it does not.
        TypeError: `path` is not a path.
    """
    saved = snapshot.read(path)
    source, info, window = os.fspath(path), model.info, model.engine.context_length
    if saved.kind != kind:
        raise SnapshotError(f"{source} holds a {saved.kind}, not a {kind}; load it with {_LOADERS[saved.kind]}().")
    check_fingerprint(saved.fingerprint, model.fingerprint, source, but=but)
    if not model.engine.fits(saved.entry):
        raise SnapshotError(f"{source} is damaged: its blocks of keys and values are not those of this model's cache.")
    if len(saved.ids) and not 0 <= int(saved.ids.min()) <= int(saved.ids.max()) < info.vocab_size:
        raise SnapshotError(f"{source} is damaged: it has token ids outside the vocabulary.")
    if len(saved.ids) >= window:
        raise SnapshotError(
            f"{source} holds {len(saved.ids)} tokens, which leaves no room in this pipeline's context window of "
            f"{window}. Load the model with a longer context_length."
        )
    return saved


def load_chat(model: LoadedModel, path: str | os.PathLike[str]) -> Chat:
    """Read a chat from a file; see `Pipeline.load_chat`."""
    saved = read_saved(model, path, "chat", but=KEYS_ALONE)
    try:
        values = saved.conversation or {}
        tools = Tools.of(values.get("tools"))
        chat = Chat(model, tools=tools, overflow=values["overflow"], on_cancel=values["on_cancel"])
        encoder = TurnEncoder(model.tokenizer, tools)
        conversation = Conversation.from_dict(values, encoder, model.info.eos_token_ids, model.info.vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise SnapshotError(f"{os.fspath(path)} is damaged: its conversation is not valid.") from exc
    if conversation.ids.tolist() != saved.ids.tolist():
        raise SnapshotError(f"{os.fspath(path)} is damaged: its token ids are not those of its conversation.")
    same = same_keys(saved.fingerprint, model.fingerprint)
    usable = same and len(saved.entry.ids) and model.engine.import_kv(saved.entry)
    chat.restore(conversation, saved.entry if usable else None)
    return chat
