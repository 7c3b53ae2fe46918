"""A trial of a draft model: one reply without drafts, with a fixed number, and with as many as pay."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ov_phi3.generation.config import GenerationConfig
from ov_phi3.kv.layout import inference_precision

__all__ = ["TRIAL_DRAFTS", "TRIAL_PROMPT", "DraftTrial", "try_draft_model"]

TRIAL_PROMPT = "Describe a day in a small town by the sea."
"""A prompt whose reply does not repeat it, so that the draft model has to guess."""

TRIAL_DRAFTS = 3
"""Drafts of each step, where the number is fixed."""

_TOKENS = 48
_PAIRS = 2
_LEAST_TOKENS_PER_STEP = 1.3  # of a draft model that is of use


@dataclass(frozen=True)
class DraftTrial:
    """What the trial of a draft model found.

    Attributes:
        plain: ids of the reply without drafts.
        drafted: ids of the reply with `TRIAL_DRAFTS` drafts in every step.
        num_drafts: drafts that were computed for it.
        num_accepted: of these, the ones that the reply has.
        tokens_per_step: of it; 1 if no draft is ever right.
        auto_tokens_per_step: with the number of drafts that is expected to be fastest, on a model that has run before.
        auto_time: its time per token, divided by that without drafts; the median of two pairs.
        exact: whether the model computes in float32, so that the ids must be equal.
    """

    plain: tuple[int, ...]
    drafted: tuple[int, ...]
    num_drafts: int
    num_accepted: int
    tokens_per_step: float
    auto_tokens_per_step: float
    auto_time: float
    exact: bool

    @property
    def num_equal(self) -> int:
        """Ids at the start of both replies that are equal."""
        pairs = enumerate(zip(self.plain, self.drafted, strict=False))
        shorter = min(len(self.plain), len(self.drafted))
        return next((index for index, (one, other) in pairs if one != other), shorter)

    @property
    def verdict(self) -> tuple[Literal["ok", "warning", "error"], str, str]:
        """Whether it works and is of use, the finding, and what to do about a problem or ''."""
        detail = (
            f"the first {self.num_equal} of {len(self.plain)} greedy tokens are those without drafts; "
            f"{self.num_accepted} of {self.num_drafts} drafts accepted ({TRIAL_DRAFTS} in a step), "
            f'{self.tokens_per_step:.2f} tokens per step; with speculation="auto" {self.auto_tokens_per_step:.2f} '
            f"tokens per step, and {self.auto_time:.2f} of the time per token"
        )
        if self.num_equal < len(self.plain):
            if self.exact:
                return "error", detail, "in float32 all must be equal: please report this"
            detail += "; a later difference is usually rounding (several tokens in a step), not a fault"
        if self.tokens_per_step < _LEAST_TOKENS_PER_STEP:
            return "warning", detail, "its guesses are rarely right: use a smaller model of the same family"
        return "ok", detail, ""


def try_draft_model(model_dir: Path, device: str, draft_dir: Path, draft_device: str | None) -> DraftTrial:
    """Load a model with a draft model, and generate the replies through the public API.

    Raises:
        ov_phi3.Error: they do not load, or a reply fails.
    """
    from ov_phi3.loading import load

    with load(model_dir, device, draft_model=draft_dir, draft_device=draft_device) as pipe:
        without = GenerationConfig(max_new_tokens=_TOKENS, do_sample=False, ignore_eos=True, speculation="off")
        plain = pipe.generate(TRIAL_PROMPT, without)
        fixed = pipe.generate(TRIAL_PROMPT, without.replace(speculation=None, num_assistant_tokens=TRIAL_DRAFTS))
        auto = pipe.generate(TRIAL_PROMPT, without, speculation="auto")  # measures what drafts cost
        ratios = []
        for _ in range(_PAIRS):
            auto = pipe.generate(TRIAL_PROMPT, without, speculation="auto")
            ratios.append((auto.metrics.tpot_ms or 0.0) / (pipe.generate(TRIAL_PROMPT, without).metrics.tpot_ms or 1.0))
        return DraftTrial(
            plain=tuple(plain.token_ids),
            drafted=tuple(fixed.token_ids),
            num_drafts=fixed.metrics.drafted_tokens or 0,
            num_accepted=fixed.metrics.accepted_tokens or 0,
            tokens_per_step=fixed.metrics.tokens_per_step or 0.0,
            auto_tokens_per_step=auto.metrics.tokens_per_step or 0.0,
            auto_time=statistics.median(ratios),
            exact=inference_precision(pipe.device.kind, pipe.load_report.ov_config) == "f32",
        )
