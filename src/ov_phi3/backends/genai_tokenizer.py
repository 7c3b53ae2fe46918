"""The arguments of `openvino_genai.Tokenizer` for an engine that gets token ids, with as little memory as possible."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from ov_phi3.errors import ModelError
from ov_phi3.system.jinja import IDENTITY_TOKENIZER
from ov_phi3.text.tokenizer_files import constant, find_operation, read_graph

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

__all__ = ["genai_tokenizer_arguments"]

_SPACE = "▁".encode()
_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


def genai_tokenizer_arguments(
    model_dir: Path, control_ids: Collection[int] = (), *, can_encode: bool
) -> tuple[Any, ...]:
    """Return the arguments of `openvino_genai.Tokenizer` for a model directory.

    The engine needs the detokenizer's vocabulary (structured output) and the ids of the special tokens (chat
    templates). It does not need the tables that encode text: `TokenizerGraph` holds them already.

    Args:
        model_dir: holds the tokenizer graphs.
        control_ids: tokens that are no text, besides those that the detokenizer leaves out.
        can_encode: load the tokenizer's tables too. An engine with a draft model needs them: it compares how the two
            tokenizers encode a text.

    Raises:
        ModelError: a graph cannot be read, or a string table points outside its data, which would kill the process.
    """
    import openvino

    tokenizer, detokenizer = (model_dir / f"openvino_{name}.xml" for name in ("tokenizer", "detokenizer"))
    model = read_graph(detokenizer)
    if can_encode:
        read_graph(tokenizer)
    try:
        encoding = tokenizer.read_text(encoding="utf-8")
        tables = np.fromfile(tokenizer.with_suffix(".bin"), dtype=np.uint8) if can_encode else np.zeros(1, np.uint8)
        graph = detokenizer.read_text(encoding="utf-8")
        weights = np.fromfile(detokenizer.with_suffix(".bin"), dtype=np.uint8)
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(
            f"the tokenizer files in {model_dir} could not be read ({exc}). Export the model again."
        ) from exc
    _write_literal_pieces(model, graph, weights, control_ids)
    if not can_encode:
        _, marker, special_tokens = encoding.rpartition("<rt_info>")
        end = marker + special_tokens if marker and "</net>" in special_tokens else "</net>"
        encoding = IDENTITY_TOKENIZER + end
    return encoding, openvino.Tensor(tables), graph, openvino.Tensor(weights)


def _write_literal_pieces(model: Any, graph: str, weights: NDArray[np.uint8], control_ids: Collection[int]) -> None:
    """Make the detokenizer's table hold what its pieces mean: " x" instead of "▁x", a byte instead of "<0x0A>".

    GenAI gives the table to XGrammar as it is (openvino-genai 2026.4.1), so that a grammar would ask for the marks of
    SentencePiece instead of spaces and bytes. The operations behind the table, which replace the marks, then find none.
    Control tokens get an empty text, which XGrammar takes for a token without one: otherwise the text "<s>" in a
    structure would be answered by the token of this name.

    Args:
        model: the detokenizer graph, checked.
        graph: its XML, whose offsets say where the table is.
        weights: its data, uint8, shape [bytes]; changed in place.
        control_ids: tokens that are no text, besides those that the detokenizer leaves out.
    """
    vocabulary = find_operation(model, "VocabDecoder")
    left_out = constant(vocabulary, 4).tolist() if vocabulary is not None and vocabulary.get_input_size() > 4 else ()
    controls = {*left_out, *control_ids}
    has_bytes = find_operation(model, "ByteFallback") is not None
    has_spaces = any(_SPACE in packed for packed in _patterns(model))
    table = _table(graph) if has_bytes or has_spaces or controls else None
    if table is None:
        return
    begins, ends, characters = (weights[offset : offset + size] for offset, size in table)
    starts, stops = begins.view(np.int32), ends.view(np.int32)
    for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        piece = characters[start:stop].tobytes()
        if index in controls:
            literal = b""
        elif has_bytes and _BYTE.fullmatch(piece):
            literal = bytes([int(piece[3:5], 16)])
        elif has_spaces and _SPACE in piece:
            literal = piece.replace(_SPACE, b" ")
        else:
            continue
        characters[start : start + len(literal)] = np.frombuffer(literal, np.uint8)
        stops[index] = start + len(literal)


def _patterns(model: Any) -> list[bytes]:
    """The patterns that the graph replaces."""
    operations = [operation for operation in model.get_ops() if operation.get_type_name() == "RegexNormalization"]
    return [constant(operation, 3).tobytes() for operation in operations]


def _table(graph: str) -> list[tuple[int, int]] | None:
    """Where the data of the piece table is: offset and size of its begins, ends and characters; None if not found."""
    net = ET.fromstring(graph)
    layers = {layer.get("id"): layer for layer in net.iter("layer")}
    decoder = next((key for key, layer in layers.items() if layer.get("type") == "VocabDecoder"), None)
    sources = {e.get("to-port"): e.get("from-layer") for e in net.iter("edge") if e.get("to-layer") == decoder}
    data = [layers[sources[port]].find("data") for port in ("1", "2", "3") if sources.get(port) in layers]
    places = [(int(d.get("offset", -1)), int(d.get("size", -1))) for d in data if d is not None]
    return places if len(places) == 3 and min(min(place) for place in places) >= 0 else None
