"""A draft model: a smaller model with the same tokenizer, which guesses the next tokens on a cache of its own.

Its passes run in the engine's thread, between two steps of the model. A rejected draft token is undone as in the model:
by a smaller number of cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.paged.block_tables import BlockTables
from ov_phi3.backends.paged.cache import PagedCache
from ov_phi3.backends.paged.drafter import HitRate
from ov_phi3.backends.paged.model_runner import ModelRunner, ScheduledTokens
from ov_phi3.backends.paged.sequence import Sequence as TokenSequence
from ov_phi3.backends.paged.step_costs import DraftPlan, MeasuredCosts, Offer, StepCosts
from ov_phi3.backends.protocol import Cancelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.lookup import LookupDrafter
    from ov_phi3.backends.protocol import Request

__all__ = ["DraftModel", "DraftSequence", "ModelDrafter"]

_FEW = 8  # uncached tokens that may be computed one by one

_FIRST_CREDIT, _CREDIT_PER_TOKEN = 4.0, 0.015  # see `DraftPlan`: who loads a draft model expects it to pay
# How often a draft is taken to be right before anything is known of a text: by the probability that the draft model
# gives it, from so much on; and for those that it has not computed yet. The outcomes correct these estimates.
_CONFIDENCES = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95)
_RATES = (0.2, 0.35, 0.55, 0.7, 0.85, 0.95)
_RATE = 0.7
_RECOVERY = 0.01  # for each token without drafts, the estimate comes back by this share towards the first one


class DraftModel:
    """The draft model of an engine, with its cache.

    Args:
        runner: the compiled model and its cache.
        vocab_size: of the model that it drafts for; larger ids are never drafted.
        context_length: longest sequence that it drafts for, in tokens.
        rope_boundary: see `Sequence`; its own.
        chunk: most tokens of a pass; 0 for any number.
        max_blocks: see `PagedCache`.

    Attributes:
        runner: the compiled model and its cache.
        costs: what its passes cost, for the engine's thread between two passes.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        vocab_size: int,
        context_length: int,
        rope_boundary: int | None = None,
        chunk: int = 0,
        max_blocks: int = 0,
    ) -> None:
        self.runner = runner
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.boundary = rope_boundary
        self.chunk = chunk or 2**31
        self.costs: StepCosts = MeasuredCosts(runner.time_rows)
        self.cache = PagedCache(runner, max_blocks)
        self._tables = BlockTables(self.cache.blocks, self.cache.copy)

    def pass_cost(self, model: StepCosts) -> float:
        """What a pass of one token costs, in steps of one row of the model."""
        return max(1, round(32 * self.costs.seconds / model.seconds)) / 32 if model.seconds else 1.0

    def compute(
        self,
        sequence: TokenSequence,
        count: int,
        drafts: tuple[int, ...] = (),
        should_continue: Callable[[], bool] | None = None,
    ) -> NDArray[np.float32] | None:
        """Compute the next tokens of a sequence.

        Args:
            sequence: the sequence, whose `num_cached` tokens are computed already.
            count: how many.
            drafts: of these, the last ones, which the sequence does not have.
            should_continue: see `ModelRunner.run`.

        Returns:
            Logits behind the last one, float32, shape [vocabulary]; None if the cache has no room.
        """
        while not self._tables.reserve(sequence, count):
            if not self.cache.grow():
                return None
        try:
            logits = self.runner.run([ScheduledTokens(sequence, count, (count - 1,), drafts)], should_continue)
        except BaseException:
            self.cache.undo([sequence])
            raise
        sequence.cached_long = sequence.is_long
        sequence.num_cached += count
        return logits[-1, : self.vocab_size]

    def close(self) -> None:
        """Free the model."""
        self.runner.close()


class DraftSequence:
    """One sequence in a draft model: its ids, and the drafts that are computed behind them.

    Args:
        model: the draft model.
        request: the request that the sequence starts with.
    """

    def __init__(self, model: DraftModel, request: Request) -> None:
        self._model = model
        self._request = request
        self._sequence = TokenSequence(request.ids, model.boundary)
        self._drafts: list[int] = []  # behind the sequence's ids, as far as they may still come true
        self._begun = False
        self._out_of_vocabulary = bool(len(request.ids)) and int(request.ids.max()) >= model.vocab_size

    @property
    def lag(self) -> int:
        """Tokens of the sequence that are not computed; 0 before the first draft."""
        return len(self._sequence) - self._sequence.num_cached if self._begun else 0

    def room(self, most: int) -> int:
        """How many tokens can be drafted, at most `most`: none past the context length or a LongRoPE boundary."""
        sequence = self._sequence
        room = self._model.context_length - len(sequence)
        if sequence.room_on_this_side is not None:
            room = min(room, sequence.room_on_this_side)
        return 0 if self._out_of_vocabulary else max(0, min(most, room))

    def add(self, token: int) -> None:
        """Note the next id. Drafts that did not come true are not cached any more."""
        sequence = self._sequence
        if self._drafts and self._drafts[0] == token:
            del self._drafts[0]
        else:
            self._drafts = []
            sequence.num_cached = min(sequence.num_cached, len(sequence))
        self._out_of_vocabulary |= token >= self._model.vocab_size
        sequence.append((token,))

    def draft(self, count: int, proceed: Callable[[float], bool] = lambda _: True) -> list[int]:
        """The most likely next tokens by the draft model.

        Args:
            count: how many, at most.
            proceed: gets the probability of each draft; False ends the drafts.
        """
        count = self.room(count)
        drafts: list[int] = []
        self._drafts = []
        try:
            logits = self._catch_up() if count else None
            while logits is not None:
                token = int(logits.argmax())
                drafts.append(token)
                if not proceed(_probability(logits, token)) or len(drafts) == count:
                    break
                logits = self._model.compute(self._sequence, 1, (token,))
        except Cancelled:
            drafts = []
        self._drafts = list(drafts)
        return drafts

    def _catch_up(self) -> NDArray[np.float32] | None:
        """Compute what is not cached; the logits behind the last token."""
        sequence, model = self._sequence, self._model
        sequence.num_cached = min(sequence.num_cached, len(sequence) - 1)
        model.cache.recompute_crossed(sequence)
        if not self._begun:
            self._begun = True
            most = len(sequence) - 1 if self._request.most_reused is None else self._request.most_reused
            model.cache.prefixes.take(sequence, min(most, len(sequence) - 1), isolated=self._request.isolated)
        logits = None
        while sequence.num_uncached:
            count = min(sequence.num_uncached, model.chunk)
            if 1 < count <= _FEW and count < model.costs.of(count) + 2.0 * model.costs.change:
                count = 1  # another number of tokens than in the passes before costs more
            if (logits := model.compute(sequence, count, (), self._request.should_continue)) is None:
                return None
        return logits

    def close(self) -> None:
        """Release its blocks; later sequences may find them."""
        self._sequence.num_cached = min(self._sequence.num_cached, len(self._sequence))
        self._model.cache.release(self._sequence)


class ModelDrafter:
    """Drafts by lookup where that is expected to give more tokens per time, else by a draft model.

    Args:
        sequence: the sequence in the draft model.
        lookup: drafts by lookup, and knows nothing of the draft model.
        model: the draft model.
        costs: what steps of the model cost.
        alone: whether nothing else runs. Otherwise the passes of the draft model would hold up other replies, and it
            does not draft.
        number: how many tokens the draft model drafts in every step; default: what is expected to be fastest.
    """

    def __init__(
        self,
        sequence: DraftSequence,
        lookup: LookupDrafter,
        model: DraftModel,
        costs: StepCosts,
        alone: Callable[[], bool],
        number: int | None = None,
    ) -> None:
        self._sequence, self._lookup, self._model = sequence, lookup, model
        self._costs, self._alone, self._number = costs, alone, number
        self._plan = DraftPlan(_FIRST_CREDIT, _CREDIT_PER_TOKEN)
        self._rate = HitRate(_RATE)
        self._rates = [HitRate(rate) for rate in _RATES]
        self._pending: list[tuple[int, HitRate]] = []  # drafts of the model whose outcome is not known

    def add(self, ids: Sequence[int]) -> None:
        """Note ids that the sequence has now."""
        self._lookup.add(ids)
        self._plan.earn(len(ids))
        for token in ids:
            self._learn(token)
            self._sequence.add(token)

    def draft(self, most: int) -> list[int]:
        """The next tokens, at most `most` and possibly none."""
        self._pending = []
        if self._number is not None:
            return self._sequence.draft(min(most, self._number))
        costs, each = self._costs, 0.0
        if not self._plan.can_draft(costs, self._lookup.run):
            self._plan.take(1, 1.0)
            return []
        offers = [Offer(costs, self._lookup.chances(min(most, costs.most_drafts)))]
        room = self._sequence.room(min(most, costs.most_drafts)) if self._alone() else 0
        if room:
            each = self._model.pass_cost(costs)
            offers.append(Offer(costs, [self._rate.rate] * room, self._setup(each), each))
        choice = self._plan.choose(offers, most, self._lookup.run)
        if choice.offer == 0:
            self._plan.take(choice.rows, choice.cost)
            return self._lookup.predicted(choice.rows - 1)
        drafts = self._draft_with_model(each, choice.rows, choice.expected / choice.cost)
        if not drafts:  # the reply is not wanted any more, or the cache has no room
            self._plan.take(1, 1.0)
            return []
        rows = self._rows_for(1 + len(drafts), most)
        spared = costs.of(choice.rows) - costs.of(rows) + (choice.rows - 1 - len(drafts)) * each
        self._plan.take(rows, choice.cost - spared)
        return drafts + drafts[-1:] * (rows - 1 - len(drafts))

    def _setup(self, each: float) -> float:
        """What it costs to compute the tokens that came without drafts of the model, in steps."""
        behind = max(0, self._sequence.lag - 2)
        passes = self._model.costs
        return each * math.ceil(behind / passes.rows[-1]) * passes.of(behind) if behind else 0.0

    def _draft_with_model(self, each: float, rows: int, speed: float) -> list[int]:
        """Drafts for so many rows; fewer where one more is not worth its pass.

        Args:
            each: what a pass of the draft model costs, in steps.
            rows: of the step.
            speed: expected tokens per step of one row, by which a token is worth `1 / speed` steps.
        """
        row = (self._costs.of(rows) - 1.0) / (rows - 1)
        all_right = 1.0
        outcomes: list[HitRate] = []

        def proceed(probability: float) -> bool:
            nonlocal all_right
            rate = self._rates[sum(probability >= least for least in _CONFIDENCES) - 1]
            outcomes.append(rate)
            all_right *= rate.rate
            return all_right * self._rate.rate / speed > each + row

        drafts = self._sequence.draft(rows - 1, proceed)
        self._pending = list(zip(drafts, outcomes, strict=False))
        return drafts

    def _rows_for(self, needed: int, most: int) -> int:
        """Rows of a step with drafts: a number of the table, and that of the last step where a change is dear."""
        costs = self._costs
        rows = next(rows for rows in costs.rows if rows >= needed)
        last = self._plan.rows
        if rows < last <= most + 1 and costs.of(last) - costs.of(rows) < costs.change:
            rows = last
        return rows if 1 < rows <= most + 1 else needed

    def _learn(self, token: int) -> None:
        if not self._pending:
            self._rate.rate += _RECOVERY * max(0.0, _RATE - self._rate.rate)
            return
        draft, outcome = self._pending.pop(0)
        outcome.note(token == draft)
        self._rate.note(token == draft)
        if token != draft:
            self._pending = []

    def close(self) -> None:
        """Give up the blocks in the draft model."""
        self._sequence.close()


def _probability(logits: NDArray[np.float32], token: int) -> float:
    """Probability of the most likely token."""
    return 1.0 / float(np.exp(logits - logits[token]).sum())
