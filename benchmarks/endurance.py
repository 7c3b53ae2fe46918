"""Thousands of requests of all kinds on one pipeline, a third cancelled and a tenth invalid, and a check for leaks.

    python benchmarks/endurance.py MODEL [--device CPU] [--requests 2000] [--backend llm_pipeline] [--json FILE]

The number of a request determines its content. Five fixed questions, asked greedily among the other requests, must give
the same ids every time. Every invalid request must raise an error of the library. At the end the memory of the process
is compared with the memory after the first hundred requests, and its threads and file handles with those before the
first request. The first hundred requests include prompts as long as the window, as many as the KV cache has room for,
so that it is fully allocated.

The default window is 2,048 tokens; prompts that exceed it are among the invalid requests. ``--concurrency`` sets the
number of threads that ask at once. The exit code is 1 if an answer changed, an invalid request was answered or raised
another exception, memory grew by more than 3 %, or a thread or a file handle is left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _environment import run_installed

if __name__ == "__main__":
    run_installed()

import psutil

import ov_phi3
from _common import add_load_arguments, add_model_arguments, check, exit_with, load_options, progress, write_json
from ov_phi3.bench.prompts import chat_message

FIRST = 100
MOST_GROWTH = 1.03
GROUPS = ("whole", "cancelled", "wrong")
QUESTIONS = (
    "Name three colours.",
    "What is a lighthouse?",
    "Count to five.",
    "Where does bread come from?",
    "Say something kind.",
)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "ignore_eos": True}


class OnPurposeError(Exception):
    """Raised by a callback of this script."""


def _raise(*_: object) -> None:
    raise OnPurposeError


class Run:
    """Makes the requests and records the faults.

    Attributes:
        pipe: the pipeline under test.
        known: the ids of the answer to each of `QUESTIONS`.
        counts: number of requests by kind.
        faults: deviations from the expected outcome, a sentence each.
    """

    def __init__(self, pipe: ov_phi3.Pipeline, seed: int, folder: Path) -> None:
        self.pipe = pipe
        self.seed = seed
        self.folder = folder
        self.own_engine = pipe.load_report.backend == "infer_request"
        self.known = [self.ask(question) for question in QUESTIONS]
        self.pipe.generate(QUESTIONS[0], regex="[0-9]", max_new_tokens=2)  # opens the graph that structures need, once
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def ask(self, question: str) -> list[int]:
        """The ids of the answer to a fixed question."""
        return self.pipe.generate(question, **GREEDY).token_ids

    def request(self, number: int) -> None:
        """Make a request and check its outcome. Of 30 requests 3 are invalid, 10 are cancelled, 17 run to their end."""
        rng = random.Random(f"{self.seed} {number}")
        slot = number % 30
        group = "wrong" if slot % 10 == 9 else "cancelled" if slot % 3 == 1 or slot == 2 else "whole"
        makers = {"wrong": self._wrong(), "cancelled": self._cancelled(), "whole": self._whole()}[group]
        name, make = rng.choice(list(makers.items()))
        if number == FIRST // 2:
            group, name, make = "whole", "prompts as long as the window", self._longest
        problem = None
        try:
            problem = make(rng)
            if group == "wrong":
                problem = f"it was answered with {problem!r}"
        except (ov_phi3.Error, TypeError, OnPurposeError) as error:
            if group != "wrong":
                problem = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - any other exception is a fault
            problem = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts[f"{group}: {name}"] += 1
            if problem is not None:
                self.faults.append(f"request {number} ({name}): {problem}")

    # -- kinds of request; each returns the fault of its outcome, or None ---------------------------------------------

    def _whole(self) -> dict[str, Callable[[random.Random], str | None]]:
        kinds = {
            "a fixed question": self._fixed,
            "streamed": lambda rng: _check_text(
                "".join(c.text for c in self.pipe.stream(chat_message(rng), **_short(rng)))
            ),
            "in an event loop": lambda rng: _check_text(asyncio.run(self._async(rng))),
            "sampled": lambda rng: self._ended(self.pipe.generate(chat_message(rng), seed=7, **_short(rng))),
            "a conversation": self._conversation,
            "until a stop string": lambda rng: self._ended(
                self.pipe.generate(chat_message(rng), stop=["e", "\n"], max_new_tokens=30)
            ),
        }
        if self.own_engine:
            kinds |= {"scored": self._scored, "saved and loaded": self._saved}
        return {
            **kinds,
            "beams": lambda rng: self._ended(
                self.pipe.generate(chat_message(rng), num_beams=3, num_return_sequences=2, max_new_tokens=8)
            ),
            "by a regular expression": lambda rng: self._ended(
                self.pipe.generate(chat_message(rng), regex="[0-9]{3}", max_new_tokens=8)
            ),
        }

    def _cancelled(self) -> dict[str, Callable[[random.Random], str | None]]:
        def after_a_few(rng: random.Random) -> str | None:
            stream = self.pipe.stream(chat_message(rng), max_new_tokens=400, ignore_eos=True)
            for _, _ in zip(range(rng.randrange(1, 12)), stream, strict=False):
                pass
            stream.cancel()
            return self._reason(stream, "cancelled")

        def at_once(rng: random.Random) -> str | None:
            stream = self.pipe.stream(chat_message(rng) * 4, max_new_tokens=400, ignore_eos=True)
            stream.cancel()
            return self._reason(stream, "cancelled")

        def dropped(rng: random.Random) -> str | None:
            next(iter(self.pipe.stream(chat_message(rng), max_new_tokens=400, ignore_eos=True)))
            return None

        def out_of_time(rng: random.Random) -> str | None:
            result = self.pipe.generate(chat_message(rng), max_new_tokens=400, ignore_eos=True, timeout=0.05)
            return None if result.finish_reason == "timeout" else f"it ended with {result.finish_reason}"

        def in_a_conversation(rng: random.Random) -> str | None:
            chat = self.pipe.chat(system="Be brief.", on_cancel=rng.choice(["keep", "drop"]))
            with chat.stream(chat_message(rng), max_new_tokens=400, ignore_eos=True) as stream:
                next(iter(stream))
            return self._ended(chat.send(chat_message(rng), max_new_tokens=6))

        return {
            "after a few tokens": after_a_few,
            "at once": at_once,
            "by dropping the stream": dropped,
            "by a deadline": out_of_time,
            "within a conversation": in_a_conversation,
        }

    def _wrong(self) -> dict[str, Callable[[random.Random], object]]:
        window, words = self.pipe.context_length, self.pipe.info.vocab_size
        return {
            "an unknown option": lambda rng: self.pipe.generate(chat_message(rng), max_tokens_new=5),
            "an id outside the vocabulary": lambda _: self.pipe.generate([1, words]),
            "a prompt that is too long": lambda rng: self.pipe.generate([rng.randrange(words)] * window),
            "half a character": lambda rng: self.pipe.generate(chat_message(rng) + "\ud800"),
            "options that contradict": lambda rng: self.pipe.generate(chat_message(rng), do_sample=False, seed=-1),
            "a callback that raises": lambda rng: self.pipe.generate(chat_message(rng), on_prefill=_raise),
            "nothing": lambda _: self.pipe.generate([]),
            "a wrong type": lambda _: self.pipe.generate(3),  # type: ignore[arg-type]
        }

    def _fixed(self, rng: random.Random) -> str | None:
        index = rng.randrange(len(QUESTIONS))
        question, expected, ids = QUESTIONS[index], self.known[index], self.ask(QUESTIONS[index])
        return None if ids == expected else f"{question!r} got {ids}, and {expected} before"

    async def _async(self, rng: random.Random) -> str:
        return "".join([c.text async for c in self.pipe.stream(chat_message(rng), **_short(rng))])

    def _conversation(self, rng: random.Random) -> str | None:
        chat = self.pipe.chat(system="Be brief.", overflow="drop_oldest")
        for _ in range(3):
            chat.send(chat_message(rng), **_short(rng))
        other = chat.fork()
        chat.rewind()
        chat.send(chat_message(rng), **_short(rng))
        return self._ended(other.send(chat_message(rng), max_new_tokens=4))

    def _scored(self, rng: random.Random) -> str | None:
        score = self.pipe.score(chat_message(rng), "Yes, of course.")
        return None if score.total < 0 else f"its log-probability is {score.total}"

    def _saved(self, rng: random.Random) -> str | None:
        file = self.folder / f"{threading.get_ident()}.safetensors"
        self.pipe.prefill([{"role": "system", "content": chat_message(rng)}]).save(file)
        return self._ended(self.pipe.generate("Go on.", prefix=self.pipe.load_prefix(file), **_short(rng)))

    def _longest(self, rng: random.Random) -> str | None:
        """Prompts as long as the window, until every block of the KV cache has been used."""
        room = self.pipe.load_report.kv_cache_tokens or 0
        problem = None
        for _ in range(max(1, -(-room // self.pipe.context_length))):
            ids = [rng.randrange(1000, 2000) for _ in range(self.pipe.context_length - 8)]
            problem = problem or self._ended(self.pipe.generate(ids, max_new_tokens=8))
        return problem

    @staticmethod
    def _ended(result: ov_phi3.GenerationResult) -> str | None:
        return None if result.finish_reason in ("stop", "length") else f"it ended with {result.finish_reason}"

    @staticmethod
    def _reason(stream: ov_phi3.TokenStream, reason: str) -> str | None:
        finish_reason = stream.result.finish_reason
        return None if finish_reason == reason else f"it ended with {finish_reason}, not {reason}"


def _short(rng: random.Random) -> dict[str, Any]:
    return {"max_new_tokens": rng.randrange(2, 16), "ignore_eos": True}


def _check_text(text: str) -> str | None:
    return None if isinstance(text, str) else f"it gave {text!r}"


def state() -> dict[str, int]:
    """Resources of the process: memory in bytes, threads (Python's separately too) and file handles."""
    gc.collect()
    process = psutil.Process()
    handles = process.num_handles() if sys.platform == "win32" else process.num_fds()
    return {
        "memory_bytes": process.memory_info().rss,
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
        "handles": handles,
    }


def make_requests(run: Run, numbers: range, at_once: int) -> None:
    """Make these requests from `at_once` threads."""

    def work(number: int) -> None:
        progress(f"request {number} of {numbers.stop}")
        run.request(number)

    with ThreadPoolExecutor(at_once) as callers:
        list(callers.map(work, numbers))


def main() -> int:
    """Run the requests, print the comparison, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--backend", default="llm_pipeline", help="backend of the pipeline (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help=f"more than {FIRST} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    parser.set_defaults(context_length=2048)
    options = parser.parse_args()
    if options.requests <= FIRST:
        parser.error(f"--requests {options.requests}: expected more than {FIRST}, as the check begins after them")
    check(options)
    with tempfile.TemporaryDirectory() as folder:
        report = run_all(options, Path(folder))
    progress("")
    if options.json:
        write_json(options.json, report)
    return 0 if report["passed"] else 1


def run_all(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load the model, make all requests, compare the states; return the report."""
    started = time.perf_counter()
    load = {**load_options(options), "backend": options.backend, "concurrency": options.concurrency}
    with ov_phi3.load(options.model, **load) as pipe:
        run = Run(pipe, options.seed, folder)
        states = [state()]
        for start in range(0, options.requests, FIRST):
            make_requests(run, range(start, min(start + FIRST, options.requests)), options.concurrency)
            states.append(state())
        same = [run.ask(question) for question in QUESTIONS] == run.known
    before, early, late = states[0], states[1], states[-1]
    ratio = late["memory_bytes"] / early["memory_bytes"]
    left = {name: late[name] - before[name] for name in ("threads", "python_threads", "handles")}
    report = {
        "passed": not run.faults and same and ratio <= MOST_GROWTH and not any(value > 0 for value in left.values()),
        "model": str(options.model),
        "device": str(pipe.device),
        "backend": options.backend,
        "concurrency": options.concurrency,
        "kinds": dict(run.counts),
        "states": states,
        "memory_ratio": ratio,
        "left": left,
        "same_answers": same,
        "faults": run.faults,
        "machine": ov_phi3.Machine.here().to_dict(),
    }
    print(f"{options.requests} requests in {time.perf_counter() - started:.0f} s on {pipe.device}, ", end="")
    show(report)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report."""
    kinds, faults, ratio = report["kinds"], report["faults"], report["memory_ratio"]
    groups = {group: sum(count for kind, count in kinds.items() if kind.startswith(group)) for group in GROUPS}
    print(f"{report['backend']}, {report['concurrency']} at once: ", end="")
    print(", ".join(f"{count} {group}" for group, count in groups.items()))
    for kind, count in sorted(kinds.items()):
        print(f"  {kind:<42}{count:>6}")
    before, early, late = (report["states"][index] for index in (0, 1, -1))
    mib = [entry["memory_bytes"] / 2**20 for entry in (before, early, late)]
    print(
        f"Memory: {mib[0]:.0f} MiB before, {mib[1]:.0f} after the first {FIRST}, {mib[2]:.0f} at the end: {ratio:.3f}"
    )
    print(f"Threads: {before['threads']} before, {late['threads']} at the end; file handles: ", end="")
    print(f"{before['handles']} before, {late['handles']} at the end")
    print(f"The five fixed questions: {'the same answers' if report['same_answers'] else 'OTHER ANSWERS'}")
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    print("passed" if report["passed"] else f"FAILED ({len(faults)} faults)")


if __name__ == "__main__":
    exit_with(main)
