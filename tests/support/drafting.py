"""A reply with drafts, without a model: which drafts come, and what the steps cost."""

from __future__ import annotations

from ov_phi3.backends.paged.drafter import Drafter
from ov_phi3.backends.paged.step_costs import StepCosts


def time_with_drafts(drafter: Drafter, reply: list[int], costs: StepCosts) -> float:
    """Time of a reply in steps of one row, without its first token, which the drafter knows."""
    at, time, last = 1, 0.0, 1
    while at < len(reply):
        drafts = drafter.draft(len(reply) - at - 1)
        rows = 1 + len(drafts)
        time += costs.of(rows) + (costs.change if rows != last else 0.0)
        last = rows
        right = 0
        while right < len(drafts) and drafts[right] == reply[at + right]:
            right += 1
        drafter.add(reply[at : at + right + 1])
        at += right + 1
    return time
