"""Tell apart what a chat template wrote and what came from a message, in the string that the template rendered.

A control token's name in the rendered string is a control token only if the template wrote it. Every text of a
message in which a name could begin or end is rendered with *marks*: characters of Unicode's private use area, which
occur nowhere else, behind every character that begins a name and before every one that ends it. A name with a mark
inside came, at least in part, from a message. The marks are removed again. They are valid only if the template did the
same with them as without, so that the string without marks is what the template makes of the real texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ov_phi3.errors import TemplateError
from ov_phi3.text.segments import Segment, check_encodable

__all__ = ["Marks"]

_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF8FF)]
_WHITE_SPACE = re.compile(r"\s+")

Render = Callable[[Callable[[str], str]], str]
"""Renders the messages, with a function applied to every text in them."""


@dataclass(frozen=True)
class Marks:
    """The names of a model's control tokens, and the strings that its chat template compares texts with.

    Attributes:
        names: names of the control tokens.
        compared: strings in the template's source that texts may be compared with, or split at.
    """

    names: tuple[str, ...]
    compared: tuple[str, ...] = ()

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted((name for name in self.names if len(name) > 1), key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, names)) or r"[^\s\S]") + ")")

    @cached_property
    def _edges(self) -> re.Pattern[str]:
        """Zero-width: behind a character that begins a name, and before one that ends a name."""
        names = [name for name in self.names if len(name) > 1]
        begins, ends = ("|".join(sorted({re.escape(name[at]) for name in names})) for at in (0, -1))
        return re.compile(f"(?<={begins})|(?={ends})" if names else r"[^\s\S]")

    @cached_property
    def _squeezed(self) -> tuple[str, ...]:
        return tuple({_squeeze(name) for name in self.names if len(name) > 1})

    @cached_property
    def _kept(self) -> re.Pattern[str]:
        """What must stay whole for the template to find it."""
        kept = sorted((text for text in self.compared if self._edges.search(text)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, kept)) or r"[^\s\S]")

    def segments(self, render: Render, texts: Iterable[str]) -> list[Segment]:
        """The segments of what a template makes of messages.

        Args:
            render: renders the messages with a function applied to their texts.
            texts: the texts, as `render` gives them to the function.

        Raises:
            PromptError: a text holds a lone surrogate.
            TemplateError: the template cannot render the messages, or changes texts so that their names of control
                tokens cannot be told from its own.
        """
        given = list(dict.fromkeys(texts))
        for text in given:
            check_encodable(text)
        plain = render(str)
        if not any(self._needs_marks(text) for text in given):
            return self._split(plain)
        mark = self._unused_mark((plain, *given))
        marked = render(lambda text: self._marked(text, mark))
        if marked.replace(mark, "") == plain:
            return self._split(marked, mark)
        for behind in (True, False):
            if (segments := self._with_kept(render, plain, mark, behind=behind)) is not None:
                return segments
        if any(self._may_hold_name(text) for text in given):
            raise TemplateError(
                "a message has text that looks like a control token, and the chat template changes it so that it "
                "cannot be told from the template's own control tokens. Remove the text, or pass load(template=...)."
            )
        return self._split(plain)

    def _needs_marks(self, text: str) -> bool:
        return self._edges.search(text) is not None or self._is_inside_name(text)

    def _is_inside_name(self, text: str) -> bool:
        squeezed = _squeeze(text)
        return bool(squeezed) and any(squeezed in name for name in self._squeezed)

    def _may_hold_name(self, text: str) -> bool:
        """Whether a text holds a name in any spelling, or the begin, the end or the middle of one."""
        squeezed = _squeeze(text)
        return self._is_inside_name(text) or any(
            name in squeezed
            or any(squeezed.endswith(name[:n]) or squeezed.startswith(name[n:]) for n in range(1, len(name)))
            for name in self._squeezed
        )

    def _marked(self, text: str, mark: str) -> str:
        marked = self._edges.sub(mark, text)
        if marked == text and self._is_inside_name(text):  # no name can reach over the text then
            end = len(text.rstrip())
            marked = text[:end] + mark + text[end:]
        return marked

    def _with_kept(self, render: Render, plain: str, mark: str, *, behind: bool) -> list[Segment] | None:
        """As above, with the strings whole that the template looks for; None if that changes the result too.

        Such a string may itself be the name of a control token. Then a mark stands beside it, and where both are
        together in the result, it came from a message. A string that the template has cut off its mark is found out
        by doubling it: it then occurs more often.
        """
        marked = render(lambda text: self._beside(text, mark, behind=behind))
        if marked.replace(mark, "") != plain:
            return None
        doubled = render(lambda text: self._kept.sub(lambda found: found[0] * 2, text))
        pattern = (
            rf"({self._names.pattern[1:-1]})(?=\s*{mark})"
            if behind
            else rf"(?<={mark})\s*({self._names.pattern[1:-1]})"
        )
        flagged = Counter(found[1] for found in re.finditer(pattern, marked))
        once, twice = (Counter(self._names.findall(text)) for text in (plain, doubled))
        if any(twice[name] - once[name] != flagged[name] for name in {*once, *twice} if self._kept.search(name)):
            return None
        broken = re.sub(pattern, lambda found: found[0].replace(found[1], found[1][0] + mark + found[1][1:]), marked)
        return self._split(broken, mark)

    def _beside(self, text: str, mark: str, *, behind: bool) -> str:
        """A text with marks, but beside what the template looks for: behind it or before it, over white space."""
        parts, position = [], 0
        for found in self._kept.finditer(text):
            parts += [self._edges.sub(mark, text[position : found.start()]), found[0]]
            position = found.end()
        parts.append(self._edges.sub(mark, text[position:]))
        for index in range(1, len(parts), 2):
            other = index + 1 if behind else index - 1
            part = parts[other]
            inner = part.lstrip() if behind else part.rstrip()
            space = part[: len(part) - len(inner)] if behind else part[len(inner) :]
            if not inner and other in (0, len(parts) - 1):  # the template may strip the white space at the edge
                parts[other] = mark + part if behind else part + mark
            else:
                parts[other] = space + mark + inner if behind else inner + mark + space
        return "".join(parts)

    def _split(self, text: str, mark: str = "") -> list[Segment]:
        parts = self._names.split(text)
        segments = (
            Segment(part if index % 2 or not mark else part.replace(mark, ""), bool(index % 2))
            for index, part in enumerate(parts)
        )
        return [segment for segment in segments if segment.text]

    def _unused_mark(self, texts: Sequence[str]) -> str:
        used = set().union(*texts, *self.compared, *self.names)
        return next(character for character in _PRIVATE_USE if character not in used)


def _squeeze(text: str) -> str:
    return _WHITE_SPACE.sub("", text).casefold()
