"""The bytes of every token, from the exported detokenizer graph.

The graph is cut in memory before UTF8Validate: a single token can be part of a character, and its bytes are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.text.tokenizer_files import (
    constant,
    create_infer_request,
    find_operation,
    not_a_graph,
    read_graph,
    replace_constant,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DetokenizerGraph"]


class DetokenizerGraph:
    """The exported detokenizer, as a table of bytes. It is decoded once, when it is opened.

    Args:
        path: `openvino_detokenizer.xml`.

    Attributes:
        size: number of ids that the graph knows.
        skipped: ids that ordinary text leaves out (the special tokens).
        strips_space: whether the detokenizer removes one space from the start of a text, which undoes SentencePiece's
            mark.

    Raises:
        ModelError: the file cannot be read or is not a detokenizer graph.
    """

    def __init__(self, path: Path) -> None:
        model = read_graph(path)
        vocabulary = find_operation(model, "VocabDecoder")
        last = find_operation(model, "UTF8Validate") or find_operation(model, "StringTensorPack")
        if vocabulary is None or last is None:
            raise not_a_graph(path, "detokenizer")
        self.size = int(vocabulary.input(1).get_shape()[0])
        self.skipped = frozenset(constant(vocabulary, 4).tolist()) if vocabulary.get_input_size() > 4 else frozenset()
        if self.skipped:
            replace_constant(vocabulary, 4, np.zeros(0, np.int32))
        outputs = [last.input(i).get_source_output() for i in range(3)]
        self._read_table(create_infer_request(outputs, model.get_parameters(), "ids_to_bytes"))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; none for an id that only pads the vocabulary."""
        if not 0 <= token_id < self.size:
            return b""
        return self._bytes[self._begins[token_id] + self._anchor_length : self._ends[token_id]].tobytes()

    def _read_table(self, request: Any) -> None:
        """Decode every id behind an anchor token, so that the rules for the start of a text do not apply to it."""
        ids = np.arange(self.size, dtype=np.int64)
        begins, ends, characters = _infer(request, ids[:, None])
        letters = np.flatnonzero(
            (ends - begins == 1) & (characters[np.minimum(begins, characters.size - 1)] == ord("a"))
        )
        anchor = (
            letters[0] if letters.size else next(i for i in ids if characters[begins[i] : ends[i]].tobytes().isalpha())
        )
        self._anchor_length = ends[anchor] - begins[anchor]
        pairs = np.stack([np.full_like(ids, anchor), ids], axis=1)
        self._begins, self._ends, self._bytes = _infer(request, pairs)
        spaced = next((i for i in range(self.size) if self.token_bytes(i).startswith(b" ")), None)
        at_start = b"" if spaced is None else characters[begins[spaced] : ends[spaced]].tobytes()
        self.strips_space = spaced is not None and at_start != self.token_bytes(spaced)


def _infer(request: Any, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """Decode rows of ids, shape [rows, tokens]: begin and end of each row's text, and the bytes of all texts."""
    begins, ends, characters = (np.array(output) for output in request.infer([ids]).values())
    return begins, ends, characters
