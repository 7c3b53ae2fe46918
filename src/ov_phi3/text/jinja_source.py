"""Jinja's rules for white space, applied to a template's source before it is interpreted.

transformers renders chat templates with `trim_blocks` and `lstrip_blocks`
(https://jinja.palletsprojects.com/en/stable/templates/#whitespace-control). The interpreter of openvino_genai also
strips the indentation of `{{ ... }}`, which Jinja2 does not. Here every text becomes an expression, so that
nothing is left for the interpreter to strip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ov_phi3.errors import TemplateError

__all__ = ["explicit_text", "string_literals"]

_STRING = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_OPEN = re.compile(r"\{\{|\{%|\{#")
_INSIDE = re.compile(rf"{_STRING}|[-+]?%\}}|-?\}}\}}|[\[\](){{}}]", re.DOTALL)
_RAW = re.compile(r"\{%[-+]?\s*raw\s*[-+]?%\}(.*?)\{%[-+]?\s*endraw\s*[-+]?%\}", re.DOTALL)
_CLOSED_BY = {"{{": ("}}", "-}}"), "{%": ("%}", "-%}", "+%}")}
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class _Tag(NamedTuple):
    """A tag of a template and the text before it; the last one has only text."""

    before: str
    opening: str
    body: str
    closing: str


def explicit_text(source: str) -> str:
    """The same template with every text as `{{ '...' }}`, and without comments and white space control.

    Raises:
        TemplateError: a tag is not closed.
    """
    parts: list[str] = []
    starts_line, strip_next = True, False
    for before, opening, body, closing in _tags(source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")):
        text = before.lstrip() if strip_next else before
        if strip_next:
            starts_line = before[: len(before) - len(text)].endswith("\n")
        if opening not in ("raw", "") and body.startswith("-"):
            text = text.rstrip()
        elif opening in ("{%", "{#", "raw") and not body.startswith("+"):
            text = _without_indent(text, starts_line=starts_line)
        parts += [_literal(text), _literal(body) if opening == "raw" else ""]
        if opening in _CLOSED_BY:
            inside = body[1:] if body[:1] in ("-", "+") else body
            parts.append(f"{opening} {inside.strip()} {_CLOSED_BY[opening][0]}")
        strip_next, starts_line = closing.startswith("-"), closing.endswith("\n")
    return "".join(parts)


def string_literals(source: str) -> list[str]:
    """The strings in quotes inside the tags of a template, with their escapes replaced."""
    literals = [
        literal for tag in _tags(source) if tag.opening in _CLOSED_BY for literal in re.findall(_STRING, tag.body)
    ]
    return [re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), literal[1:-1]) for literal in literals]


def _tags(source: str) -> Iterator[_Tag]:
    position, text = 0, ""
    while (found := _OPEN.search(source, position)) is not None:
        text += source[position : found.start()]
        if raw := _RAW.match(source, found.start()):
            position = raw.end()
            trimmed = raw[0][-3] not in "-+" and source.startswith("\n", position)
            yield _Tag(text, "raw", raw[1], "%}\n" if trimmed else "%}")
            text, position = "", position + trimmed
            continue
        start, opening = found.end(), found[0]
        end, closing = _end(source, start, opening)
        body, position = source[start:end], end + len(closing)
        # trim_blocks: the first newline behind a block or a comment goes.
        if opening != "{{" and closing[0] not in "-+" and source.startswith("\n", position):
            closing, position = closing + "\n", position + 1
        yield _Tag(text, opening, body, closing)
        text = ""
    yield _Tag(text + source[position:], "", "", "")


def _end(source: str, start: int, opening: str) -> tuple[int, str]:
    """Where a tag ends, and its closing sign."""
    if opening == "{#":
        end = source.find("#}", start)
        if end >= start:
            minus = end > start and source[end - 1] in "-+"
            return end - minus, source[end - minus : end + 2]
    depth, position = 0, start
    while opening != "{#" and (sign := _INSIDE.search(source, position)) is not None:
        text = sign[0]
        if depth == 0 and text in _CLOSED_BY[opening]:
            return sign.start(), text
        if text in "([{":
            depth += 1
        elif text[0] not in "'\"" and text[-1] in ")]}":
            depth -= 1
            position = sign.start() + 1  # one sign of several, as the first of "}}" in a dict's end
            continue
        position = sign.end()
    raise TemplateError(f"a tag is not closed: {source[start - 2 : start + 40]!r}")


def _literal(text: str) -> str:
    return "{{ '" + "".join(_ESCAPES.get(character, character) for character in text) + "' }}" if text else ""


def _without_indent(text: str, *, starts_line: bool) -> str:
    """lstrip_blocks: without the white space between the start of a line and a block."""
    line = text.rfind("\n") + 1
    return text[:line] if (line or starts_line) and not text[line:].strip() else text
