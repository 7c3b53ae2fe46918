"""Ten thousand hostile cases: a program that attacks the library from outside and reports faults.

    python tests/support/hostile.py MODEL [--device CPU] [--cases 10000] [--seed 0] [--only prompts options ...]

A number determines each case. The library must give the right answer or raise an `ov_phi3.Error` (a `TypeError` for a
wrong type) within the deadline. Any other outcome is a fault: it is printed with the number of its case, and the exit
code is 1. At the end a known prompt must get the same answer as at the beginning.

The kinds: prompts, messages, options, token ids, model directories, snapshot files, command lines, environment
variables. MODEL should be tiny, so that a case takes milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile_cases import KINDS, KNOWN_PROMPT, Target

import ov_phi3

DEADLINE_S = 30.0  # per case; a second is enough on an idle machine
SHARES = {
    "prompts": 0.2,
    "messages": 0.15,
    "options": 0.2,
    "ids": 0.15,
    "snapshots": 0.2,
    "directories": 0.05,
    "commands": 0.04,
    "environment": 0.01,
}


@dataclass
class Attack:
    """Runs the cases; counts their outcomes by kind, and records the faults."""

    target: Target
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self, kind: str, number: int) -> None:
        """Run a case."""
        rng = random.Random(f"{kind} {number}")
        started = time.monotonic()
        faulthandler.dump_traceback_later(DEADLINE_S, exit=True)  # a hang ends the program with a traceback
        try:
            outcome = KINDS[kind](self.target, rng)
        except ov_phi3.Error as error:
            outcome = type(error).__name__
            if not str(error):
                self.faults.append(f"{kind} {number}: an error without a message: {error!r}")
        except TypeError as error:
            outcome = "TypeError"
            if "incompatible function arguments" in str(error) or "openvino" in str(error):  # raised by a binding
                self.faults.append(f"{kind} {number}: {error!r}")
        except BaseException as error:
            outcome = "FAULT"
            self.faults.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() - started > DEADLINE_S:
            self.faults.append(f"{kind} {number}: took {time.monotonic() - started:.0f} s")
        counts = self.outcomes.setdefault(kind, {})
        counts[outcome] = counts.get(outcome, 0) + 1

    def known_answers(self) -> list[list[int]]:
        """The answers of all pipelines to the known prompt."""
        options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "do_sample": False}
        return [pipe.generate(KNOWN_PROMPT, **options).token_ids for pipe in self.target.pipes]


def cases(total: int, only: list[str], seed: int) -> Iterator[tuple[str, int]]:
    """The kind and the number of each case, shuffled."""
    numbered = [
        (kind, seed + number)
        for kind, share in SHARES.items()
        if kind in only
        for number in range(max(1, round(total * share)))
    ]
    random.Random(seed).shuffle(numbered)
    return iter(numbered)


def main() -> int:
    """Run the cases and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pipes = [
            stack.enter_context(ov_phi3.load(options.model, options.device, backend=backend, context_length=256))
            for backend in ("llm_pipeline", "infer_request")
        ]
        pipes[-1].prefill(list(range(300, 320))).save(folder / "whole.kv")
        saved = (folder / "whole.kv").read_bytes()
        attack = Attack(Target(options.model, options.device, pipes, folder, saved))
        before = attack.known_answers()
        count = 0
        for kind, number in cases(options.cases, options.only, options.seed):
            attack.run(kind, number)
            count += 1
        after = attack.known_answers()
    for kind, counts in attack.outcomes.items():
        print(f"{kind}: {dict(sorted(counts.items(), key=lambda item: -item[1]))}")
    if before != after:
        attack.faults.append(f"the answer to the known prompt changed: {before} before, {after} after")
    for fault in attack.faults[:40]:
        print("FAULT", fault)
    print(f"{count} cases, {len(attack.faults)} faults")
    return 1 if attack.faults else 0


if __name__ == "__main__":
    sys.exit(main())
