"""The Jinja interpreter that openvino_genai has (minja), for chat templates.

It belongs to `openvino_genai.Tokenizer`, which renders any template that it is given. One tokenizer without tables
serves the whole process. Before it renders, it tries a template with messages of its own, changes the messages if that
fails, and prints what it finds to stderr. So the template is wrapped: for those trials it says that all is well.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from typing import Any

from ov_phi3.errors import TemplateError
from ov_phi3.system.core import import_genai, import_openvino, keeping_signal_stack, shared_core
from ov_phi3.system.tokenizers_library import extension_library, tokenizers_importable

__all__ = ["IDENTITY_TOKENIZER", "render_jinja"]

# "Tokenizers" that return their input. GenAI accepts them, and they need no tables.
IDENTITY_TOKENIZER = """<?xml version="1.0"?>
<net name="tokenizer" version="11"><layers>
<layer id="0" name="text" type="Parameter" version="opset1"><data shape="?" element_type="string"/>
<output><port id="0" precision="STRING"><dim>-1</dim></port></output></layer>
<layer id="1" name="same" type="Result" version="opset1">
<input><port id="0" precision="STRING"><dim>-1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges>
"""
"""The XML of a tokenizer graph without its last line, which is `</net>`."""

_IDENTITY_DETOKENIZER = (
    IDENTITY_TOKENIZER.replace("tokenizer", "detokenizer")
    .replace("string", "i64")
    .replace("STRING", "I64")
    .replace('shape="?"', 'shape="?,?"')
    .replace("<dim>-1</dim>", "<dim>-1</dim><dim>-1</dim>")
)

# The trials look for these words in what a template renders: "some_tool" means that it has tools.
_WRAPPED = "{{% if ov_phi3_renders is defined %}}{}{{% else %}}some_tool{{% endif %}}"
_TRIAL = [{"role": "user", "content": "x"}]
_lock = threading.Lock()


def render_jinja(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        source: a template in which no text stands at an edge: the interpreter's rules for white space differ from
            Jinja2's. `text/jinja_source.py` makes it.
        variables: JSON-like values by name. `strftime_now` and `raise_exception` are there too.

    Raises:
        TemplateError: the interpreter does not know something in the template, or the template raised an exception.
    """
    with _lock:
        tokenizer = _tokenizer()
        try:
            text = tokenizer.apply_chat_template(
                _TRIAL, True, _WRAPPED.format(source), None, {**variables, "ov_phi3_renders": True}
            )
        except RuntimeError as exc:
            raise TemplateError(_reason(str(exc))) from exc
    return str(text)


@functools.cache
def _tokenizer() -> Any:
    """The tokenizer; it is never freed, as the Core."""
    import numpy as np

    openvino, genai = import_openvino(), import_genai()
    shared_core().add_extension(str(extension_library()))  # keeps the library loaded until the process has ended
    no_tables = openvino.Tensor(np.zeros(1, np.uint8))
    with keeping_signal_stack(), tokenizers_importable():
        return genai.Tokenizer(f"{IDENTITY_TOKENIZER}</net>", no_tables, f"{_IDENTITY_DETOKENIZER}</net>", no_tables)


def _reason(message: str) -> str:
    """The interpreter's own sentence, without file names and without the template's text."""
    sentence = message.rpartition("Minja's error: ")[2].strip().splitlines()[0]
    return re.sub(r" at row \d+, column \d+:?$", "", sentence)
