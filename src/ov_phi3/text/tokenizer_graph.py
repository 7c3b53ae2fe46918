"""Text to token ids by the exported tokenizer graph, without anything added.

The graph is cut in memory. It starts behind StringTensorUnpack, because strings that pass through numpy lose their
trailing NUL characters. It ends at the BPE operation: truncation, padding and special tokens are not needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ov_phi3.errors import ClosedError, ModelError, forked
from ov_phi3.system.core import never_freed_in_children
from ov_phi3.text.tokenizer_files import (
    constant,
    create_infer_request,
    find_operation,
    not_a_graph,
    packed_strings,
    read_graph,
    replace_constant,
)

__all__ = ["TokenizerGraph"]

_NEVER_MATCHES = b"([^\\s\\S])"


class TokenizerGraph:
    """The exported tokenizer. Safe to use from several threads.

    Args:
        path: `openvino_tokenizer.xml`.

    Attributes:
        added_tokens: text of each added (control) token -> its id.
        byte_tokens: whether the vocabulary has tokens named `<0x00>` to `<0xFF>` for single bytes. The graph reads such
            a name inside a text as the byte token; Hugging Face's tokenizer does not.
        prefixes_text: whether the graph puts a mark in front of every text (SentencePiece's "▁").

    Raises:
        ModelError: the file cannot be read or is not a BPE tokenizer graph.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        model = read_graph(path)
        bpe = self._bpe(model)
        self.added_tokens = _added_tokens(bpe)
        self.byte_tokens = bool(bpe.get_attributes().get("byte_fallback"))
        self.prefixes_text = bool(_prefix_normalizers(model))
        self._request = self._compile(model)
        # A second infer request, for text that continues another text; it differs only if there is a mark in front.
        self._continuation_request: Any = None if self.prefixes_text else self._request
        self._lock = threading.Lock()
        self._process = os.getpid()
        never_freed_in_children(self)

    def encode(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """Encode each text by itself.

        Args:
            texts: any texts; an empty one has no ids.
            continues: the texts continue others, so put no mark in front of them.

        Raises:
            ClosedError: this process is a fork of the one that loaded the graph.
        """
        encoded = [text.encode("utf-8") for text in texts if text]
        if not encoded:
            return [[] for _ in texts]  # the graph's operations crash on an empty batch
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int32)
        begins = np.concatenate(([0], ends[:-1])).astype(np.int32)
        characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        if self._process != os.getpid():
            raise ClosedError(forked(f"the tokenizer in {self._path.parent}", self._process))
        with self._lock:
            request = self._get_continuation_request() if continues else self._request
            outputs = request.infer([begins, ends, characters]).values()
            row_begins, row_ends, ids = (np.array(output) for output in outputs)
        rows = iter(ids[b:e].tolist() for b, e in zip(row_begins.tolist(), row_ends.tolist(), strict=True))
        return [next(rows) if text else [] for text in texts]

    def _get_continuation_request(self) -> Any:
        """The infer request that puts no mark in front. Only text that names a control token needs it, so the second
        copy of the graph is compiled on first use.
        """
        if self._continuation_request is None:
            model = read_graph(self._path)
            for operation in _prefix_normalizers(model):
                replace_constant(operation, 4, _NEVER_MATCHES)
            self._continuation_request = self._compile(model)
        return self._continuation_request

    def _compile(self, model: Any) -> Any:
        """An infer request of the graph from packed bytes to ragged ids."""
        from openvino import opset13

        unpack = find_operation(model, "StringTensorUnpack")
        if unpack is None:
            raise not_a_graph(self._path, "tokenizer")
        inputs = []
        for index, dtype in enumerate((np.int32, np.int32, np.uint8)):
            parameter = opset13.parameter([-1], dtype=dtype)
            unpack.output(index).replace(parameter.output(0))
            inputs.append(parameter)
        bpe = self._bpe(model)
        return create_infer_request([bpe.output(i) for i in range(3)], inputs, "text_to_ids")

    def _bpe(self, model: Any) -> Any:
        operation = find_operation(model, "BPETokenizer")
        if operation is None:
            if find_operation(model, "SentencepieceTokenizer") is not None:
                raise ModelError(
                    f"{self._path} was converted with the SentencePiece operation, which does not tell control tokens "
                    "from text. Convert the tokenizer again, from the directory of the original model, with "
                    "`convert_tokenizer DIR --with-detokenizer -o OUTPUT` (without --use-sentencepiece-backend)."
                )
            raise ModelError(
                f"{self._path} holds no BPE tokenizer, which every Phi-3 model has. Is it another architecture?"
            )
        return operation


def _added_tokens(bpe: Any) -> dict[str, int]:
    """The added tokens of a BPE operation: the last four of its inputs, in graphs that have any.

    Its inputs are 5 of text, 3 of vocabulary, then merges as 3 (joined) or 6 (left and right parts).
    """
    count = bpe.get_input_size()
    if count not in (15, 18):
        return {}
    texts, ids = packed_strings(bpe, count - 4), constant(bpe, count - 1).tolist()
    return {text.decode("utf-8"): int(token_id) for text, token_id in zip(texts, ids, strict=True)}


def _prefix_normalizers(model: Any) -> list[Any]:
    """The operations that put a mark in front of a text: replacements of a pattern that begins with '^'."""
    normalizers = []
    for operation in model.get_ops():
        if operation.get_type_name() == "RegexNormalization" and operation.get_input_size() >= 5:
            pattern = constant(operation, operation.get_input_size() - 2).tobytes()
            if pattern.lstrip(b"(?:").startswith(b"^"):
                normalizers.append(operation)
    return normalizers
