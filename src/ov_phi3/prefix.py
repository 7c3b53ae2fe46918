"""A prefilled prompt as a value: kept beside the engine, used by any number of requests, saved to a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3 import snapshot
from ov_phi3.errors import SnapshotError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ov_phi3.kv_tensors import KVValue
    from ov_phi3.pipeline import Pipeline

__all__ = ["Prefix"]


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


def read_for(pipeline: Pipeline, path: str | os.PathLike[str], kind: str, *, engine: bool = True) -> snapshot.Snapshot:
    """A snapshot of a kind that is of this pipeline's model, and fits it.

    Raises:
        SnapshotError: it is not.
        TypeError: `path` is not a path.
    """
    from ov_phi3.identity import check_identity

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
