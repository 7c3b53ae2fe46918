"""Chat templates rendered as transformers renders them, and published templates to try.

The templates of `data/chat_templates.json` are from the test data of openvino.genai (Apache-2.0),
tests/python_tests/data/tokenizer_configs.py; each belongs to the model that it is named after.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "chat_templates.json").read_text(encoding="utf-8")
)


class Generation(Extension):
    """The tag `generation` of transformers, which changes nothing in the text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def render(source: str, messages: Iterable, *, bos: str = "", eos: str = "", prompt: bool = True, tools=None) -> str:
    """What `apply_chat_template(tokenize=False)` of transformers gives."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source).render(
        messages=list(messages), tools=tools, documents=None, add_generation_prompt=prompt, bos_token=bos, eos_token=eos
    )
