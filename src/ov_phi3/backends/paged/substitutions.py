"""What a reply puts in place of the tokens of the text that it follows: another name, another mark behind a value."""

from __future__ import annotations

from dataclasses import dataclass

from ov_phi3.backends.paged.drafter import HitRate

__all__ = ["Substitutions"]

# How often a token is replaced as before, and how often it is kept, until the outcomes of a text correct the estimates:
# by how often the replacement was confirmed, first behind any token, then behind the same one; then the same where much
# of the source was followed before.
_REPLACED = (0.4, 0.6, 0.8, 0.7, 0.8, 0.9, 0.1, 0.45, 0.8, 0.55, 0.75, 0.9)
_KEPT = (0.5, 0.35, 0.15, 0.25, 0.15, 0.1, 0.85, 0.5, 0.15, 0.4, 0.2, 0.1)
_MOST_CONFIRMATIONS = 2
_SAME_CONTEXT, _FOLLOWED = 3, 6  # indices of the first estimates of these kinds
_MUCH = 9  # tokens


@dataclass(slots=True)
class _Replacement:
    token: int
    confirmations: int = 0


class Substitutions:
    """Remembers by which token another one was replaced the last time, and how often such a guess is right.

    A variable that was renamed twice is renamed the third time too, and where a list has a comma behind each value and
    the reply a quotation mark, it has one behind the next value.
    """

    def __init__(self) -> None:
        self._known: dict[int | tuple[int, int], _Replacement] = {}
        self._replaced = [HitRate(rate) for rate in _REPLACED]
        self._kept = [HitRate(rate) for rate in _KEPT]

    def guess(self, before: int, token: int, followed: int) -> tuple[int, float] | None:
        """The token that comes where the source has `token`, and how likely; None if nothing is known of it.

        Args:
            before: the last token of the reply.
            token: what the source has next.
            followed: tokens of the source that came before it.
        """
        known = self._find(before, token, followed)
        if known is None:
            return None
        replacement, level = known
        replaced, kept = self._replaced[level].rate, self._kept[level].rate
        return (replacement.token, replaced) if replaced > kept else (token, kept)

    def learn(self, before: int, token: int, followed: int, came: int, *, everywhere: bool) -> bool:
        """Note what came where the source has `token`; returns whether anything was known of it.

        Args:
            before: see `guess`.
            token: see `guess`.
            followed: see `guess`.
            came: the next token of the reply.
            everywhere: a new replacement may hold behind any token, not only behind `before`.
        """
        known = self._find(before, token, followed)
        if known is not None:
            replacement, level = known
            self._replaced[level].note(came == replacement.token)
            self._kept[level].note(came == token)
        self._update((before, token), token, came, is_new=True)
        self._update(token, token, came, is_new=everywhere)
        return known is not None

    def _find(self, before: int, token: int, followed: int) -> tuple[_Replacement, int] | None:
        """What is known of a token, and the index of its estimates."""
        first = _FOLLOWED if followed >= _MUCH else 0
        for key, level in (((before, token), _SAME_CONTEXT), (token, 0)):
            replacement = self._known.get(key)
            if replacement is not None:
                return replacement, first + level + replacement.confirmations
        return None

    def _update(self, key: int | tuple[int, int], token: int, came: int, *, is_new: bool) -> None:
        known = self._known.get(key)
        if came == token:
            if known is not None:
                known.confirmations -= 1
                if known.confirmations < 0:
                    del self._known[key]
        elif known is None:
            if is_new:
                self._known[key] = _Replacement(came)
        elif known.token == came:
            known.confirmations = min(known.confirmations + 1, _MOST_CONFIRMATIONS)
        else:
            self._known[key] = _Replacement(came)
