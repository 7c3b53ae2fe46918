"""Beam search with the rules and options of OpenVINO GenAI, on forks of one sequence.

Beams are searched in groups. In each step a group takes the best continuations of its beams; a continuation that ends
with a stop token becomes a finished reply, and a group is done by `stop_criteria`. A group's log-probabilities are
lowered by `diversity_penalty` for tokens that earlier groups chose in the same step. (openvino.genai, `sampler.cpp`,
2026.4; the method is that of Vijayakumar et al., "Diverse Beam Search", arXiv 1610.02424.)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.paged.group import Fork, Group
from ov_phi3.backends.protocol import Cancelled, Hypothesis
from ov_phi3.backends.sampling import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.sequence import Sequence
    from ov_phi3.backends.protocol import Request
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.text.stop_strings import StopWatch

__all__ = ["BeamGroup"]


@dataclass(slots=True)
class _Beam:
    """A sequence, or a continuation of it by one token, and its cumulative log-probability."""

    sequence: Sequence
    score: float
    watch: StopWatch | None
    token: int = -1

    @property
    def length(self) -> int:
        """Generated tokens of the sequence, without the continuation."""
        return len(self.sequence) - self.sequence.num_prompt

    def completes_stop_string(self) -> bool:
        """Whether the continuation completes a stop string; its watch then continues behind it."""
        if self.watch is None:
            return False
        self.watch = self.watch.fork()
        return self.watch.add(self.token)


@dataclass(slots=True)
class _Finished:
    """A finished reply and its normalised score."""

    ids: list[int]
    score: float
    hit_limit: bool


class _BeamSet:
    """The beams of one search group.

    Args:
        config: fully resolved.
        prompt: the sequence that they start from.
        size: number of beams.
        watch: finds stop strings, if there are any.
    """

    def __init__(self, config: GenerationConfig, prompt: Sequence, size: int, watch: StopWatch | None) -> None:
        self._config = config
        self._size = size
        self._penalty = config.length_penalty if config.length_penalty is not None else 1.0
        # Only the first beam counts in the first step, where all of them have the same continuations.
        self.ongoing = [_Beam(prompt, 0.0 if index == 0 else -np.inf, watch) for index in range(size)]
        self.finished: list[_Finished] = []
        self.done = False

    def select(self, logprobs: dict[int, NDArray[np.float64]], stop_ids: set[int]) -> list[_Beam]:
        """The continuations that become the next beams; those that end are added to `finished`.

        Args:
            logprobs: log-probabilities of the next token by `id` of the beam's sequence.
            stop_ids: tokens that end a reply.
        """
        candidates: list[_Beam] = []
        for beam in self.ongoing:
            values = logprobs[id(beam.sequence)]
            best = _largest(values, 2 * self._size)
            candidates += [_Beam(beam.sequence, beam.score + float(values[token]), beam.watch, token) for token in best]
        candidates.sort(key=lambda candidate: -candidate.score)
        chosen: list[_Beam] = []
        for rank, candidate in enumerate(candidates):
            if candidate.token in stop_ids or candidate.completes_stop_string():
                if rank < self._size:  # an end counts only among the best
                    ids = [*candidate.sequence.generated, candidate.token]
                    self.finish(candidate, ids, candidate.length + 1, limit=False)
                continue
            chosen.append(candidate)
            if len(chosen) == self._size:
                break
        self.done = self._is_done() or not chosen
        return chosen

    def finish(self, beam: _Beam, ids: list[int], length: int, *, limit: bool) -> None:
        """Keep a finished reply, if it is among the best."""
        if not np.isfinite(beam.score):
            return
        self.finished.append(_Finished(ids, beam.score / length**self._penalty if length else beam.score, limit))
        self.finished.sort(key=lambda reply: -reply.score)
        del self.finished[self._size :]

    def _is_done(self) -> bool:
        if len(self.finished) < self._size:
            return False
        criteria = self._config.stop_criteria or "heuristic"
        if criteria == "early":
            return True
        best = self.ongoing[0]
        length = best.length
        if criteria == "never" and self._penalty > 0:
            length = self._config.max_new_tokens or length
        return length > 0 and self.finished[-1].score >= best.score / length**self._penalty


class BeamGroup(Group):
    """Beam search of one prompt.

    Args:
        request: the request.
        rope_boundary: see `Sequence`.
    """

    def __init__(self, request: Request, rope_boundary: int | None = None) -> None:
        super().__init__(request, rope_boundary)
        config = request.config
        groups = config.num_beam_groups or 1
        size = (config.num_beams or 1) // groups
        self._config = config
        self._sets = [_BeamSet(config, self.prompt, size, request.stop_watch) for _ in range(groups)]
        self._stop_ids = request.stop_ids
        self._limit = config.max_new_tokens or 0
        self._steps = 0
        self._pending: dict[int, NDArray[np.float32]] = {}

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:
        """Select the next beams, once the logits of all of them are there."""
        for sequence, logits in rows:
            self._pending[id(sequence)] = np.array(logits[-1])
        if len(self._pending) < len(self.sequences):
            return  # after a preemption they are prefilled one after another
        logprobs = {key: log_softmax(logits) for key, logits in self._pending.items()}
        self._pending = {}
        self._restrict(logprobs)
        chosen = self._select(logprobs)
        self._steps += 1
        self._continue(chosen, fork)
        if self._steps >= self._limit or not self.sequences:
            self._finish_ongoing(limit=True)
            self.finish()

    def _restrict(self, logprobs: dict[int, NDArray[np.float64]]) -> None:
        """Rule out repeated n-grams, and stop tokens before `min_new_tokens`."""
        size = self._config.no_repeat_ngram_size or 0
        for sequence in self.sequences:
            values = logprobs[id(sequence)]
            if size:
                values[_ngram_ends(sequence.ids, size)] = -np.inf
            if self._steps < (self._config.min_new_tokens or 0):
                values[list(self._stop_ids)] = -np.inf

    def _select(self, logprobs: dict[int, NDArray[np.float64]]) -> list[list[_Beam]]:
        """The next beams of every search group."""
        chosen: list[list[_Beam]] = []
        for beams in self._sets:
            if beams.done:
                chosen.append([])
                continue
            lowered = logprobs
            if self._config.diversity_penalty and any(chosen):
                earlier = [beam.token for others in chosen for beam in others]
                lowered = {key: np.array(values) for key, values in logprobs.items()}
                for values in lowered.values():
                    np.subtract.at(values, earlier, self._config.diversity_penalty)
            selected = beams.select(lowered, self._stop_ids)
            chosen.append([] if beams.done else selected)
        return chosen

    def _continue(self, chosen: list[list[_Beam]], fork: Fork) -> None:
        """Turn the chosen continuations into sequences; a sequence with several continuations is forked."""
        children: dict[int, int] = defaultdict(int)
        for beam in (beam for selected in chosen for beam in selected):
            children[id(beam.sequence)] += 1
        continued: list[tuple[_BeamSet, list[_Beam]]] = []
        for beams, selected in zip(self._sets, chosen, strict=True):
            ongoing = []
            for beam in selected:
                children[id(beam.sequence)] -= 1
                sequence = beam.sequence if not children[id(beam.sequence)] else fork(beam.sequence)
                ongoing.append(_Beam(sequence, beam.score, beam.watch, beam.token))
            continued.append((beams, ongoing))
        self.sequences = []
        for beams, ongoing in continued:
            beams.ongoing = ongoing
            for beam in ongoing:
                beam.sequence.append([beam.token])
                self.sequences.append(beam.sequence)

    def _finish_ongoing(self, *, limit: bool) -> None:
        """Finish the beams that still run."""
        for beams in self._sets:
            if not beams.done:
                for beam in beams.ongoing:
                    beams.finish(beam, beam.sequence.generated, beam.length, limit=limit)

    def abandon(self) -> None:
        """End the search with the beams as they are; before the first step it is cancelled."""
        if not self._steps:
            self.finish(Cancelled())
            return
        self._finish_ongoing(limit=False)
        self.finish()

    def hypotheses(self) -> list[Hypothesis]:
        """The best replies of all search groups, best first."""
        replies = sorted((reply for beams in self._sets for reply in beams.finished), key=lambda reply: -reply.score)
        count = self._config.num_return_sequences or 1
        return [Hypothesis(reply.ids, reply.score, reply.hit_limit) for reply in replies[:count]]


def _largest(values: NDArray[np.float64], count: int) -> list[int]:
    """Indices of the largest values, largest first; of equal ones the lower index."""
    count = min(count, len(values))
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    order: list[int] = candidates[np.argsort(-values[candidates], kind="stable")][:count].tolist()
    return order


def _ngram_ends(ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Tokens that would complete an n-gram of this size that the sequence has already."""
    if len(ids) < max(size, 2):
        return ids[:0]
    if size == 1:
        return ids
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    repeated = (windows[:, :-1] == ids[len(ids) - size + 1 :]).all(axis=1)
    ends: NDArray[np.int64] = windows[repeated, -1]
    return ends
