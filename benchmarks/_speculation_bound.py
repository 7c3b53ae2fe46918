"""How many steps a reply takes at least with drafts of prompt lookup, by ids alone."""

from __future__ import annotations

from ov_phi3.backends.paged.lookup import LookupDrafter
from ov_phi3.backends.paged.step_costs import STEP_ROWS, StepCosts

__all__ = ["least_steps_per_token"]

_MOST_DRAFTS = max(STEP_ROWS) - 1


def least_steps_per_token(prompt: list[int], reply: list[int]) -> float:
    """Steps per token of a reply where each step drafts exactly the tokens that lookup predicts right.

    No rule for the number of drafts can do better with these predictions, so a ratio of times is above this figure by
    what the steps with drafts cost more.
    """
    drafter = LookupDrafter(prompt, StepCosts({1: 1.0}))
    steps, at = 0, 0
    while at < len(reply):
        guesses, coming = drafter.predicted(_MOST_DRAFTS), reply[at : at + _MOST_DRAFTS]
        right = len(coming)
        for index, (guess, token) in enumerate(zip(guesses, coming, strict=False)):
            if guess != token:
                right = index
                break
        drafter.add(reply[at : at + right + 1])
        steps, at = steps + 1, at + right + 1
    return steps / len(reply)
