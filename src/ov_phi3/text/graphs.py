"""The exported tokenizer and detokenizer graphs, opened where the library needs more than text in and text out.

`openvino_tokenizer.xml` and `openvino_detokenizer.xml` are OpenVINO graphs of string operations. Two cuts are made in
memory:

* before the tokenizer's StringTensorUnpack, because strings that pass through numpy lose their trailing NUL
  characters, and after its BPE operation, because what follows (truncation, padding, special tokens) is not wanted;
* before the detokenizer's UTF8Validate, because a single token can be part of a character, and its bytes are needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import ClosedError, ModelError, forked
from ov_phi3.system.core import never_freed_in_children, shared_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DetokenizerGraph", "TokenizerGraph", "for_engine"]

# Graphs hold operations that live in the extension library, and unloading it before the last of them is gone crashes
# the interpreter at exit. The shared Core is never freed.
_core: Any = None
_core_lock = threading.Lock()


def _tokenizer_core() -> Any:
    """An `openvino.Core` that knows the tokenizer operations."""
    global _core
    with _core_lock:
        if _core is None:
            core = shared_core()
            core.add_extension(str(_extension_library()))
            _core = core
    return _core


def _extension_library() -> Path:
    """The shared library inside openvino_tokenizers, found without importing it (its import pulls in far more)."""
    spec = find_spec("openvino_tokenizers")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root, "lib").glob("*openvino_tokenizers*")):
            if path.suffix in (".so", ".dll", ".dylib"):
                return path
    raise ModelError(
        "openvino_tokenizers is not installed, or its library is missing: pip install openvino-tokenizers."
    )


def _read(path: Path) -> Any:
    try:
        model = _tokenizer_core().read_model(path)
    except (RuntimeError, UnicodeDecodeError) as exc:  # the second is a message that quotes damaged bytes
        raise ModelError(f"{path} could not be read: {_first_line(exc)}. Export the model again.") from exc
    if not all(_tables_hold(op) for op in model.get_ops()):
        raise ModelError(f"{path.with_suffix('.bin')} is damaged: a table of strings points outside. Export again.")
    return model


def for_engine(model_dir: Path, *, whole: bool) -> tuple[Any, ...]:
    """What `openvino_genai.Tokenizer` takes, for an engine that is given ids.

    It needs the vocabulary (structured output) and the special tokens' ids (chat templates). The tables that make ids
    of text are left out, which `TokenizerGraph` has once already, unless it is to be `whole`: an engine with a draft
    model compares what their tokenizers make of a text.

    Raises:
        ModelError: a graph cannot be read, or a table of strings points outside, which would kill the process.
    """
    import openvino

    tokenizer, detokenizer = (model_dir / f"openvino_{name}tokenizer.xml" for name in ("", "de"))
    _read(detokenizer)
    if whole:
        _read(tokenizer)
        return (str(model_dir),)
    try:
        _, begin, facts = tokenizer.read_text(encoding="utf-8").rpartition("<rt_info>")
        graph = detokenizer.read_text(encoding="utf-8")
        weights = np.fromfile(detokenizer.with_suffix(".bin"), dtype=np.uint8)
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"the tokenizer files in {model_dir} could not be read ({exc}). Export again.") from exc
    ending = begin + facts if begin and "</net>" in facts else "</net>"
    return _TEXT_IN_TEXT_OUT + ending, openvino.Tensor(np.zeros(1, np.uint8)), graph, openvino.Tensor(weights)


_TEXT_IN_TEXT_OUT = """<?xml version="1.0"?>
<net name="tokenizer" version="11"><layers>
<layer id="0" name="text" type="Parameter" version="opset1"><data shape="?" element_type="string"/>
<output><port id="0" precision="STRING"><dim>-1</dim></port></output></layer>
<layer id="1" name="same" type="Result" version="opset1">
<input><port id="0" precision="STRING"><dim>-1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges>
"""


def _tables_hold(op: Any) -> bool:
    """Whether the string tables of an operation (begins, ends, characters) stay within themselves.

    The operations do not look: one that is led outside kills the process (SIGSEGV, openvino-tokenizers 2026.4.1).
    """
    nodes = [value.get_node() for value in op.input_values()]
    data = [np.asarray(node.data) if node.get_type_name() == "Constant" else None for node in nodes]
    for begins, ends, characters in zip(data, data[1:], data[2:], strict=False):
        if begins is None or ends is None or characters is None:
            continue
        kinds = [array.dtype.name for array in (begins, ends, characters)]
        if kinds != ["int32", "int32", "uint8"] or begins.ndim != 1:
            continue
        if begins.shape != ends.shape or not bool(((begins >= 0) & (begins <= ends) & (ends <= characters.size)).all()):
            return False
    return True


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines[-1] if lines else type(exc).__name__).rstrip(".")


def _find(model: Any, kind: str) -> Any | None:
    return next((op for op in model.get_ops() if op.get_type_name() == kind), None)


def _constant(op: Any, index: int) -> NDArray[Any]:
    return np.array(op.input(index).get_source_output().get_node().data)


def _strings(op: Any, index: int) -> list[bytes]:
    """A packed string constant: three inputs (begins, ends, characters) from `index` on."""
    begins, ends, chars = (_constant(op, index + i) for i in range(3))
    raw = chars.tobytes()
    return [raw[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]


class TokenizerGraph:
    """Text to token ids by the exported graph, without anything added.

    Attributes:
        added_tokens: text of each added (control) token -> its id.
        byte_tokens: whether the vocabulary holds tokens named `<0x00>` to `<0xFF>` for single bytes. The graph takes
            such a name for the token even where it stands in a text, which Hugging Face's tokenizer does not.
        prefixes_text: whether a mark is put in front of every text (SentencePiece's "▁").
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        model = _read(path)
        bpe = self._bpe(model)
        self.added_tokens = self._read_added_tokens(bpe)
        self.byte_tokens = bool(bpe.get_attributes().get("byte_fallback"))
        self.prefixes_text = bool(_prefix_normalizers(model))
        self._first = self._compile(model)
        self._later: Any = None if self.prefixes_text else self._first
        self._lock = threading.Lock()
        self._process = os.getpid()
        never_freed_in_children(self)

    def encode(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """The ids of each text by itself; `continues` leaves out the mark in front, for a text that goes on from
        another.
        """
        raw = [t.encode("utf-8") for t in texts if t]
        if not raw:
            return [[] for _ in texts]  # the graph's own operations crash on an empty batch
        ends = np.cumsum([len(r) for r in raw], dtype=np.int32)
        begins = np.concatenate(([0], ends[:-1])).astype(np.int32)
        chars = np.frombuffer(b"".join(raw), dtype=np.uint8)
        if self._process != os.getpid():
            raise ClosedError(forked(f"the tokenizer in {self._path.parent}", self._process))
        with self._lock:
            out = list(self._request(continues).infer([begins, ends, chars]).values())
            row_begins, row_ends, ids = (np.array(o) for o in out)
        rows = iter(ids[b:e].tolist() for b, e in zip(row_begins.tolist(), row_ends.tolist(), strict=True))
        return [next(rows) if t else [] for t in texts]

    def _request(self, continues: bool) -> Any:
        if not continues:
            return self._first
        if self._later is None:
            # Needed only for text that names a control token, so the second copy of the graph is made when it comes.
            model = _read(self._path)
            for op in _prefix_normalizers(model):
                _set_constant(op, 4, b"([^\\s\\S])")
            self._later = self._compile(model)
        return self._later

    def _compile(self, model: Any) -> Any:
        """An infer request of the graph from packed bytes to ragged ids."""
        from openvino import Model, opset13

        unpack = _find(model, "StringTensorUnpack")
        if unpack is None:
            raise ModelError(f"{self._path} is not a tokenizer graph of openvino_tokenizers. Export the model again.")
        inputs = []
        for index, kind in enumerate((np.int32, np.int32, np.uint8)):
            parameter = opset13.parameter([-1], dtype=kind)
            unpack.output(index).replace(parameter.output(0))
            inputs.append(parameter)
        bpe = self._bpe(model)
        cut = Model([bpe.output(i) for i in range(3)], inputs, "text_to_ids")
        return _tokenizer_core().compile_model(cut, "CPU", _SMALL).create_infer_request()

    def _bpe(self, model: Any) -> Any:
        op = _find(model, "BPETokenizer")
        if op is None:
            raise ModelError(
                f"{self._path} holds no BPE tokenizer, which every Phi-3 model has. Is it another architecture?"
            )
        return op

    @staticmethod
    def _read_added_tokens(bpe: Any) -> dict[str, int]:
        """Added tokens as the BPE operation holds them: the last four of its inputs, in graphs that have any.

        Its inputs are 5 of text, 3 of vocabulary, then merges as 3 (joined) or 6 (left and right parts).
        """
        count = bpe.get_input_size()
        if count not in (15, 18):
            return {}
        texts = _strings(bpe, count - 4)
        return {t.decode("utf-8"): int(i) for t, i in zip(texts, _constant(bpe, count - 1).tolist(), strict=True)}


class DetokenizerGraph:
    """Bytes of every token, taken from the exported graph.

    Attributes:
        size: number of ids the graph knows.
        skipped: ids that are left out of ordinary text (the special tokens).
        strips_space: whether one space is taken off the start of a text (the other half of SentencePiece's mark).
    """

    def __init__(self, path: Path) -> None:
        from openvino import Model

        model = _read(path)
        vocab = _find(model, "VocabDecoder")
        last = _find(model, "UTF8Validate") or _find(model, "StringTensorPack")
        if vocab is None or last is None:
            raise ModelError(f"{path} is not a detokenizer graph of openvino_tokenizers. Export the model again.")
        self.size = int(vocab.input(1).get_shape()[0])
        self.skipped = frozenset(_constant(vocab, 4).tolist()) if vocab.get_input_size() > 4 else frozenset()
        if self.skipped:
            _set_constant(vocab, 4, np.zeros(0, np.int32))
        cut = Model([last.input(i).get_source_output() for i in range(3)], model.get_parameters(), "ids_to_bytes")
        request = _tokenizer_core().compile_model(cut, "CPU", _SMALL).create_infer_request()
        self._read_table(request)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, or nothing for an id that only pads the vocabulary."""
        if not 0 <= token_id < self.size:
            return b""
        return self._bytes[self._begins[token_id] + self._anchor : self._ends[token_id]].tobytes()

    def _read_table(self, request: Any) -> None:
        """Decode every id behind an anchor token, so that what happens at the start of a text does not show."""
        every = np.arange(self.size, dtype=np.int64)
        begins, ends, chars = self._infer(request, every[:, None])
        plain = np.flatnonzero((ends - begins == 1) & (chars[np.minimum(begins, chars.size - 1)] == ord("a")))
        anchor = plain[0] if plain.size else next(i for i in every if chars[begins[i] : ends[i]].tobytes().isalpha())
        self._anchor = ends[anchor] - begins[anchor]
        pairs = np.stack([np.full_like(every, anchor), every], axis=1)
        self._begins, self._ends, self._bytes = self._infer(request, pairs)
        spaced = next((i for i in range(self.size) if self.token_bytes(i).startswith(b" ")), None)
        alone = b"" if spaced is None else chars[begins[spaced] : ends[spaced]].tobytes()
        self.strips_space = spaced is not None and alone != self.token_bytes(spaced)

    @staticmethod
    def _infer(request: Any, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        begins, ends, chars = (np.array(out) for out in request.infer([ids]).values())
        return begins, ends, chars


# A tokenizer takes microseconds: more than one thread or stream would only cost memory and load time.
_SMALL = {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}


def _prefix_normalizers(model: Any) -> list[Any]:
    """The operations that put a mark in front of a text: replacements of a pattern that begins with '^'."""
    found = []
    for op in model.get_ops():
        if op.get_type_name() == "RegexNormalization" and op.get_input_size() >= 5:
            pattern = _constant(op, op.get_input_size() - 2).tobytes()
            if pattern.lstrip(b"(?:").startswith(b"^"):
                found.append(op)
    return found


def _set_constant(op: Any, index: int, value: bytes | NDArray[Any]) -> None:
    from openvino import opset13

    data = np.frombuffer(value, dtype=np.uint8).copy() if isinstance(value, bytes) else value
    op.input(index).replace_source_output(opset13.constant(data).output(0))
