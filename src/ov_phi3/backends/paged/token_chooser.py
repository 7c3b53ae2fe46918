"""From the logits of a step to the next tokens of one sequence: sampler, constraint and drafter together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ov_phi3.backends.sampling import Sampler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.constraint import Constraint
    from ov_phi3.backends.paged.drafter import Drafter
    from ov_phi3.backends.paged.sequence import Sequence as TokenSequence
    from ov_phi3.backends.protocol import Request
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.results import TokenLogprob

__all__ = ["TokenChooser"]

_MOST_FORCED = 32  # tokens that are forced at once, so that a step stays short


class TokenChooser:
    """Chooses the tokens of one sequence's reply, and drafts them.

    Every token is chosen from its own logits with the history in front of it, as without drafts: a draft only decides
    whether those logits are there already. So sampling, penalties, processors and structures need nothing more.

    Where a structure leaves one token, that token is *forced*: it is taken at once, without logits, and the next step
    computes it together with those around it. If its logits are needed all the same (log-probabilities, processors), it
    is a draft of the next step, with speculation or without.

    Args:
        request: the request.
        config: options of this sequence, fully resolved.
        constraint: the structure of the reply; None for none.
        drafter: guesses tokens; None for none.

    Attributes:
        steps: steps that gave tokens.
        drafted: draft tokens that were computed, without forced ones.
        accepted: of these, the ones that the reply has.
        forced: forced tokens that took no step of their own.
    """

    def __init__(
        self, request: Request, config: GenerationConfig, constraint: Constraint | None, drafter: Drafter | None
    ) -> None:
        self._sampler = Sampler(config, request.ids, request.end_ids, request.texts)
        self._constraint = constraint
        self._drafter = drafter
        self._drafts: list[int] = []
        self._stop_ids = request.stop_ids
        self._limit = config.max_new_tokens or 0
        self._made = 0
        self.hit_limit = False
        self.ended = False
        self._num_forced = 0  # of the drafts, forced tokens at their start
        self._takes_forced = constraint is not None and not self._sampler.needs_all_logits
        self.steps = self.drafted = self.accepted = self.forced = 0

    @property
    def in_loop(self) -> bool:
        """Whether the reply repeats itself, see `stop_on_loop`."""
        return self._sampler.in_loop

    def drafts(self, sequence: TokenSequence) -> Sequence[int]:
        """Guesses of the next tokens, for the next step.

        None behind the reply's limit, behind an end token, against the structure, or past the LongRoPE boundary, where
        the tokens before them are to be computed again.
        """
        if not self._made:
            return ()
        most, room = self._limit - self._made - 1, sequence.room_on_this_side
        most = most if room is None else min(most, room)
        drafts: list[int] = []
        if self._constraint is not None and not self._takes_forced:
            drafts = self._constraint.fork().take_forced(min(most, _MOST_FORCED))
        self._num_forced = len(drafts)
        if not drafts and self._drafter is not None:
            drafts = self._drafter.draft(most)
        end = next((index + 1 for index, token in enumerate(drafts) if token in self._stop_ids), len(drafts))
        del drafts[end:]
        if self._constraint is not None and drafts:
            del drafts[self._constraint.count_allowed(drafts) :]
        self._drafts = drafts
        return drafts

    def close(self) -> None:
        """End the drafts."""
        if self._drafter is not None:
            self._drafter.close()

    @property
    def can_prepare(self) -> bool:
        """Whether `prepare` has something to do."""
        return self._constraint is not None

    def prepare(self) -> None:
        """Compute, beside a pass that it does not depend on, which tokens the structure allows behind each row."""
        if self._constraint is not None:
            self._constraint.prepare(self._drafts)

    def choose(self, sequence: TokenSequence, logits: NDArray[np.float32]) -> Iterator[tuple[int, TokenLogprob | None]]:
        """Choose tokens, one for each row, up to the first that is not the draft that the next row belongs to.

        Forced tokens behind them need no row.

        Args:
            sequence: what the tokens are appended to.
            logits: of its last token and of the drafts behind it, float32, shape [rows, vocabulary]; after a prefill
                the last row alone counts.

        Yields:
            Each token with its log-probabilities, if requested.
        """
        drafts = self._drafts[: len(logits) - 1]
        self._drafts = []
        sequence.num_forced = 0
        self.steps += 1
        self.drafted += max(0, len(drafts) - self._num_forced)
        for index, row in enumerate(logits[len(logits) - 1 - len(drafts) :]):
            token = self._sampler.choose(row, None if self._constraint is None else self._constraint.allowed())
            self._note(sequence, token)
            right = index < len(drafts) and token == drafts[index]
            if right and index < self._num_forced:
                self.forced += 1
            else:
                self.accepted += right
            yield token, self._sampler.logprobs(row, token)
            if self.ended or not right:
                break
        yield from self._take_forced(sequence)

    def _take_forced(self, sequence: TokenSequence) -> Iterator[tuple[int, None]]:
        """Take the tokens that the structure leaves no choice for."""
        constraint = self._constraint
        for _ in range(_MOST_FORCED):
            if self.ended or constraint is None or not self._takes_forced or (token := constraint.forced()) is None:
                return
            self._sampler.take(token)
            self._note(sequence, token)
            sequence.num_forced += 1
            self.forced += 1
            yield token, None

    def _note(self, sequence: TokenSequence, token: int) -> None:
        sequence.append((token,))
        self._made += 1
        if self._constraint is not None:
            self._constraint.consume(token)
        if self._drafter is not None:
            self._drafter.add((token,))
        is_stop = token in self._stop_ids
        self.hit_limit = self._made >= self._limit and not is_stop and not self.in_loop
        complete = self._constraint is not None and self._constraint.ended
        self.ended = is_stop or complete or self.in_loop or self._made >= self._limit
