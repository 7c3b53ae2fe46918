"""A prefilled prompt as a value: kept beside the engine, used by any number of requests, saved to a file; conversations
to files and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.infer_request import InferRequestBackend
from ov_phi3.backends.protocol import Request
from ov_phi3.errors import GenerationError, PromptError, SnapshotError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.results import Score
from ov_phi3.kv import snapshot
from ov_phi3.kv.cache import KVTensors, KVValue
from ov_phi3.kv.snapshot import check_identity
from ov_phi3.text.template import Message, Raw
from ov_phi3.text.tokenizer import as_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.chat import Chat
    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.pipeline import Pipeline, Prompt

__all__ = [
    "Prefix",
    "as_messages",
    "computed",
    "loaded_prefix",
    "prefilled",
    "prompt_ids",
    "restored",
    "score",
    "written",
]

_GREEDY = GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)


class Prefix:
    """The keys and values of the beginning of prompts. Made by `Pipeline.prefill` and `Pipeline.load_prefix`.

    It is a value: nothing that is generated from it changes it, and any number of them can be held beside each other.
    As long as one is held, requests on its pipeline that begin with its ids use it, also chats, without being told.
    """

    def __init__(self, value: KVValue, identity: Mapping[str, str]) -> None:
        self._value = value
        self._identity = identity

    def __repr__(self) -> str:
        return f"<Prefix of {len(self)} tokens, {self.nbytes / 2**20:.1f} MiB as {self.dtype}>"

    def __len__(self) -> int:
        return len(self._value.ids)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The ids, as a copy; shape [tokens]."""
        return np.array(self._value.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values; of a loaded prefix they are pages of its file."""
        return self._value.tensors.nbytes

    @property
    def dtype(self) -> str:
        """How they are held: "F32", "F16" or "BF16"."""
        return self._value.tensors.dtype

    @property
    def exact(self) -> bool:
        """Whether they are bit for bit what the engine holds; not so where its cache is quantised to integers."""
        return self._value.tensors.exact

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write them to a file, whole or not at all; returns its size in bytes.

        Raises:
            SnapshotError: it cannot be written.
            TypeError: `path` is not a path.
        """
        return snapshot.write(path, snapshot.Snapshot("prefix", self._identity, self._value.ids, self._value))


def _read_for(pipeline: Pipeline, path: str | os.PathLike[str], kind: str, *, engine: bool = True) -> snapshot.Snapshot:
    """A snapshot of a kind that is of this pipeline's model, and fits it.

    Raises:
        SnapshotError: it is not.
        TypeError: `path` is not a path.
    """
    found = snapshot.read(path)
    where, info = os.fspath(path), pipeline.info
    if found.kind != kind:
        loader = {"chat": "load_chat", "prefix": "load_prefix"}[found.kind]
        raise SnapshotError(f"{where} holds a {found.kind}, not a {kind}; load it with {loader}().")
    check_identity(found.identity, pipeline._identity, where, engine=engine)
    tensors = found.value.tensors
    shape = (info.num_kv_heads, tensors.tokens, info.head_dim)
    if tensors.arrays and (
        len(tensors.arrays) != 2 * info.num_layers or any(array.shape != shape for array in tensors.arrays)
    ):
        raise SnapshotError(f"{where} is damaged: its tensors do not have the shapes of this model's.")
    if len(found.ids) and not 0 <= int(found.ids.min()) <= int(found.ids.max()) < info.vocab_size:
        raise SnapshotError(f"{where} is damaged: it has token ids outside the vocabulary.")
    if len(found.ids) >= pipeline.context_length:
        raise SnapshotError(
            f"{where} holds {len(found.ids)} tokens, which leaves no room in this pipeline's context window of "
            f"{pipeline.context_length}. Load the model with a longer context_length."
        )
    return found


def prefilled(pipeline: Pipeline, prompt: Prompt, on_prefill: OnPrefill | None) -> Prefix:
    """`Pipeline.prefill`."""
    pipeline._own_loop("prefill")
    tokenizer = pipeline.tokenizer
    messages = as_messages(prompt)
    if messages is None:
        ids = pipeline.encode(prompt)
    else:
        ids = tokenizer.encode_segments(tokenizer.template.beginning(messages))
    pipeline._limits.check_room(GenerationConfig(), len(ids), pipeline.context_length - len(ids))
    with pipeline._turn() as engine:
        value = computed(pipeline, engine, ids, on_prefill)
        engine.slots.register(value)
    return Prefix(value, pipeline._identity)


def loaded_prefix(pipeline: Pipeline, path: str | os.PathLike[str]) -> Prefix:
    """`Pipeline.load_prefix`."""
    engine = pipeline._own_loop("load_prefix")
    found = _read_for(pipeline, path, "prefix")
    engine.slots.register(found.value)
    return Prefix(found.value, pipeline._identity)


def prompt_ids(pipeline: Pipeline, prompt: Prompt, prefix: Prefix | None) -> NDArray[np.int64]:
    """The ids of a prompt, behind those of a prefix where one is given."""
    if prefix is None:
        return pipeline.encode(prompt)
    if not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be a Prefix, as prefill() and load_prefix() give, not {prefix!r}")
    check_identity(prefix._identity, pipeline._identity, "this prefix")
    pipeline._own_loop("prefix=").slots.register(prefix._value)  # it may come from another pipeline with the model
    before = prefix._value.ids
    plain = isinstance(prompt, str) and not isinstance(prompt, Raw)
    if not plain:
        whole = pipeline.encode(prompt)
        if np.array_equal(whole[: len(before)], before):
            return whole
    messages = as_messages(prompt)
    tokenizer = pipeline.tokenizer
    new = whole if messages is None else tokenizer.encode_segments(tokenizer.template.following(messages))
    return np.concatenate([before, new])


def as_messages(prompt: Prompt) -> Sequence[Message] | None:
    """The messages that a prompt is, or None for `Raw` text and ids."""
    if isinstance(prompt, str):
        return None if isinstance(prompt, Raw) else [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        return prompt  # type: ignore[return-value]
    return None


def score(
    pipeline: Pipeline, prompt: Prompt, continuation: str | Sequence[int] | NDArray[Any], prefix: Prefix | None
) -> Score:
    """`Pipeline.score`."""
    pipeline._own_loop("score")
    limits, vocabulary = pipeline._limits, pipeline.info.vocab_size
    ids = prompt_ids(pipeline, prompt, prefix)
    as_text = isinstance(continuation, str)
    new = pipeline.tokenizer.encode(continuation) if as_text else as_ids(continuation, vocabulary)  # type: ignore[arg-type]
    if not len(new):
        raise PromptError("the continuation is empty; give a text or token ids.")
    limits.check_room(GenerationConfig(max_new_tokens=len(new)), len(ids), pipeline.context_length - len(ids))
    request = Request(np.concatenate([ids, new]), limits.resolve(_GREEDY, 1, streams=False), ())
    with pipeline._turn() as engine:
        logprobs = pipeline._generator.score(engine, request, len(ids), pipeline._still_open)
    return Score(new.tolist(), logprobs)


def computed(
    pipeline: Pipeline, engine: InferRequestBackend, ids: NDArray[np.int64], on_prefill: OnPrefill | None = None
) -> KVValue:
    """The keys and values of these ids, computed where they are not there yet. To be called in a turn."""

    def watch(done: int, total: int) -> bool:
        if on_prefill is not None and done >= 0:
            on_prefill(done, total)
        return pipeline._still_open()

    generator = pipeline._generator
    generator.fill(engine, Request(ids, pipeline._limits.resolve(_GREEDY, 1, streams=False), ()), watch)
    value = engine.slots.value(ids, generator.is_past(len(ids)))
    if len(value.ids) < len(ids):
        raise GenerationError("the engine no longer has the keys and values that it just computed.")
    return value


# -- conversations -----------------------------------------------------------------------------------------------------


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
    return snapshot.write(
        path, snapshot.Snapshot("chat", pipeline._identity, ids, _value_of(pipeline, ids), conversation)
    )


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
    found = _read_for(pipeline, path, "chat", engine=False)
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
