"""The arguments of `openvino_genai.Tokenizer` for an engine that gets token ids, with as little memory as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ov_phi3.errors import ModelError
from ov_phi3.text.tokenizer_files import read_graph

__all__ = ["genai_tokenizer_arguments"]

# A "tokenizer" that returns its input. GenAI accepts it, and it needs no tables.
_IDENTITY_GRAPH = """<?xml version="1.0"?>
<net name="tokenizer" version="11"><layers>
<layer id="0" name="text" type="Parameter" version="opset1"><data shape="?" element_type="string"/>
<output><port id="0" precision="STRING"><dim>-1</dim></port></output></layer>
<layer id="1" name="same" type="Result" version="opset1">
<input><port id="0" precision="STRING"><dim>-1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges>
"""


def genai_tokenizer_arguments(model_dir: Path, *, can_encode: bool) -> tuple[Any, ...]:
    """Return the arguments of `openvino_genai.Tokenizer` for a model directory.

    The engine needs the detokenizer's vocabulary (structured output) and the ids of the special tokens (chat
    templates). It does not need the tables that encode text: `TokenizerGraph` holds them already.

    Args:
        model_dir: holds the tokenizer graphs.
        can_encode: load the tokenizer's tables too. An engine with a draft model needs them: it compares how the two
            tokenizers encode a text.

    Raises:
        ModelError: a graph cannot be read, or a string table points outside its data, which would kill the process.
    """
    import openvino

    tokenizer, detokenizer = (model_dir / f"openvino_{name}.xml" for name in ("tokenizer", "detokenizer"))
    read_graph(detokenizer)
    if can_encode:
        read_graph(tokenizer)
        return (str(model_dir),)
    try:
        _, marker, special_tokens = tokenizer.read_text(encoding="utf-8").rpartition("<rt_info>")
        graph = detokenizer.read_text(encoding="utf-8")
        weights = np.fromfile(detokenizer.with_suffix(".bin"), dtype=np.uint8)
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(
            f"the tokenizer files in {model_dir} could not be read ({exc}). Export the model again."
        ) from exc
    end = marker + special_tokens if marker and "</net>" in special_tokens else "</net>"
    return _IDENTITY_GRAPH + end, openvino.Tensor(np.zeros(1, np.uint8)), graph, openvino.Tensor(weights)
