"""Thousands of requests of all kinds on one pipeline, a third of them cancelled, a tenth wrong: what is left of them?

    python benchmarks/endurance.py MODEL [--device CPU] [--requests 2000] [--backend llm_pipeline] [--json FILE]

Every request is made from its number. Five fixed questions, asked greedily among the others, must have the same ids
every time; every wrong request must raise an error of the library's. At the end the process's memory is held against
what it was after the first hundred requests, its threads and file handles against what they were before those. The
first hundred have a prompt as long as the window, so that the KV cache has all of its memory by then.

A window of 2,048 tokens is the default here; prompts that are too long for it are among the wrong requests. With
``--concurrency`` four threads ask at once. The exit code is 1 where an answer changed, something wrong was answered or
raised something else, or memory grew by more than 3 %, or a thread or a file handle is left.
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
from _common import add_load_arguments, add_model_arguments, exit_with, load_options, progress, refusal, write_json
from ov_phi3.bench.prompts import chat_message

FIRST = 100
MOST_GROWTH = 1.03
QUESTIONS = (
    "Name three colours.",
    "What is a lighthouse?",
    "Count to five.",
    "Where does bread come from?",
    "Say something kind.",
)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "ignore_eos": True}


class OnPurposeError(Exception):
    """What a callback of ours raises."""


def _raise(*_: object) -> None:
    raise OnPurposeError


class Run:
    """The requests, by number.

    Attributes:
        pipe: answers them.
        known: the ids that each of `QUESTIONS` gets.
        counts: how many requests of each kind there were.
        faults: what must not have been, one sentence each.
    """

    def __init__(self, pipe: ov_phi3.Pipeline, seed: int, folder: Path) -> None:
        self.pipe = pipe
        self.seed = seed
        self.folder = folder
        self.own_loop = pipe.load_report.backend == "infer_request"
        self.known = [self.ask(question) for question in QUESTIONS]
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def ask(self, question: str) -> list[int]:
        """The ids of a fixed question's answer."""
        return self.pipe.generate(question, **GREEDY).token_ids

    def request(self, number: int) -> None:
        """Make a request and see how it ends: 3 of 30 are wrong, 10 cancelled, 17 go to their end."""
        draw = random.Random(f"{self.seed} {number}")
        place = number % 30
        group = "wrong" if place % 10 == 9 else "cancelled" if place % 3 == 1 or place == 2 else "whole"
        makers = {"wrong": self._wrong(), "cancelled": self._cancelled(), "whole": self._whole()}[group]
        name, make = draw.choice(list(makers.items()))
        if number == FIRST // 2:
            group, name, make = "whole", "a prompt as long as the window", self._longest
        problem = None
        try:
            problem = make(draw)
            if group == "wrong":
                problem = f"it was answered with {problem!r}"
        except (ov_phi3.Error, TypeError, OnPurposeError) as error:
            if group != "wrong":
                problem = f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            problem = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts[f"{group}: {name}"] += 1
            if problem is not None:
                self.faults.append(f"request {number} ({name}): {problem}")

    # -- kinds of request; each returns what is wrong with how it ended, or None --------------------------------------

    def _whole(self) -> dict[str, Callable[[random.Random], str | None]]:
        kinds = {
            "a fixed question": self._fixed,
            "streamed": lambda draw: _unless(
                "".join(c.text for c in self.pipe.stream(chat_message(draw), **_short(draw)))
            ),
            "in an event loop": lambda draw: _unless(asyncio.run(self._async(draw))),
            "sampled": lambda draw: self._ended(self.pipe.generate(chat_message(draw), seed=7, **_short(draw))),
            "a conversation": self._conversation,
            "until a stop string": lambda draw: self._ended(
                self.pipe.generate(chat_message(draw), stop=["e", "\n"], max_new_tokens=30)
            ),
        }
        if self.own_loop:
            return {**kinds, "scored": self._scored, "saved and loaded": self._saved}
        return {
            **kinds,
            "beams": lambda draw: self._ended(
                self.pipe.generate(chat_message(draw), num_beams=3, num_return_sequences=2, max_new_tokens=8)
            ),
            "by a regular expression": lambda draw: self._ended(
                self.pipe.generate(chat_message(draw), regex="[0-9]{3}", max_new_tokens=8)
            ),
        }

    def _cancelled(self) -> dict[str, Callable[[random.Random], str | None]]:
        def after_a_few(draw: random.Random) -> str | None:
            stream = self.pipe.stream(chat_message(draw), max_new_tokens=400, ignore_eos=True)
            for _, _ in zip(range(draw.randrange(1, 12)), stream, strict=False):
                pass
            stream.cancel()
            return self._reason(stream, "cancelled")

        def at_once(draw: random.Random) -> str | None:
            stream = self.pipe.stream(chat_message(draw) * 4, max_new_tokens=400, ignore_eos=True)
            stream.cancel()
            return self._reason(stream, "cancelled")

        def dropped(draw: random.Random) -> str | None:
            next(iter(self.pipe.stream(chat_message(draw), max_new_tokens=400, ignore_eos=True)))
            return None

        def out_of_time(draw: random.Random) -> str | None:
            result = self.pipe.generate(chat_message(draw), max_new_tokens=400, ignore_eos=True, timeout=0.05)
            return None if result.finish_reason == "timeout" else f"it ended with {result.finish_reason}"

        def in_a_conversation(draw: random.Random) -> str | None:
            chat = self.pipe.chat(system="Be brief.", on_cancel=draw.choice(["keep", "drop"]))
            with chat.stream(chat_message(draw), max_new_tokens=400, ignore_eos=True) as stream:
                next(iter(stream))
            return self._ended(chat.send(chat_message(draw), max_new_tokens=6))

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
            "an unknown option": lambda draw: self.pipe.generate(chat_message(draw), max_tokens_new=5),
            "an id outside the vocabulary": lambda _: self.pipe.generate([1, words]),
            "a prompt that is too long": lambda draw: self.pipe.generate([draw.randrange(words)] * window),
            "half a character": lambda draw: self.pipe.generate(chat_message(draw) + "\ud800"),
            "options that contradict": lambda draw: self.pipe.generate(chat_message(draw), do_sample=False, seed=-1),
            "a callback that raises": lambda draw: self.pipe.generate(chat_message(draw), on_prefill=_raise),
            "nothing": lambda _: self.pipe.generate([]),
            "a wrong type": lambda _: self.pipe.generate(3),  # type: ignore[arg-type]
        }

    def _fixed(self, draw: random.Random) -> str | None:
        which = draw.randrange(len(QUESTIONS))
        found = self.ask(QUESTIONS[which])
        return (
            None if found == self.known[which] else f"{QUESTIONS[which]!r} got {found}, and {self.known[which]} before"
        )

    async def _async(self, draw: random.Random) -> str:
        return "".join([c.text async for c in self.pipe.stream(chat_message(draw), **_short(draw))])

    def _conversation(self, draw: random.Random) -> str | None:
        chat = self.pipe.chat(system="Be brief.", overflow="drop_oldest")
        for _ in range(3):
            chat.send(chat_message(draw), **_short(draw))
        other = chat.fork()
        chat.rewind()
        chat.send(chat_message(draw), **_short(draw))
        return self._ended(other.send(chat_message(draw), max_new_tokens=4))

    def _scored(self, draw: random.Random) -> str | None:
        score = self.pipe.score(chat_message(draw), "Yes, of course.")
        return None if score.total < 0 else f"its log-probability is {score.total}"

    def _saved(self, draw: random.Random) -> str | None:
        file = self.folder / f"{threading.get_ident()}.safetensors"
        self.pipe.prefill([{"role": "system", "content": chat_message(draw)}]).save(file)
        return self._ended(self.pipe.generate("Go on.", prefix=self.pipe.load_prefix(file), **_short(draw)))

    def _longest(self, draw: random.Random) -> str | None:
        ids = [draw.randrange(1000, 2000) for _ in range(self.pipe.context_length - 8)]
        return self._ended(self.pipe.generate(ids, max_new_tokens=8))

    @staticmethod
    def _ended(result: ov_phi3.GenerationResult) -> str | None:
        return None if result.finish_reason in ("stop", "length") else f"it ended with {result.finish_reason}"

    @staticmethod
    def _reason(stream: ov_phi3.TokenStream, reason: str) -> str | None:
        found = stream.result.finish_reason
        return None if found == reason else f"it ended with {found}, not {reason}"


def _short(draw: random.Random) -> dict[str, Any]:
    return {"max_new_tokens": draw.randrange(2, 16), "ignore_eos": True}


def _unless(text: str) -> str | None:
    return None if isinstance(text, str) else f"it gave {text!r}"


def state() -> dict[str, int]:
    """What the process holds: memory in bytes, threads, Python's own among them, and file handles."""
    gc.collect()
    process = psutil.Process()
    handles = process.num_handles() if sys.platform == "win32" else process.num_fds()
    return {
        "memory_bytes": process.memory_info().rss,
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
        "handles": handles,
    }


def many(run: Run, numbers: range, at_once: int) -> None:
    """Make these requests, some at once."""

    def work(number: int) -> None:
        progress(f"request {number} of {numbers.stop}")
        run.request(number)

    with ThreadPoolExecutor(at_once) as callers:
        list(callers.map(work, numbers))


def main() -> int:
    """Run the requests, print what is left of them, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    add_load_arguments(parser)
    parser.add_argument("--backend", default="llm_pipeline", help="of the pipeline (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help=f"more than {FIRST} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.set_defaults(context_length=2048)
    options = parser.parse_args()
    if options.requests <= FIRST:
        parser.error(f"--requests {options.requests}: what comes after the first {FIRST} is looked at")
    if problem := refusal(options):
        print(f"endurance.py: {problem}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _endure(options, Path(folder))
    except ov_phi3.Error as error:
        print(f"endurance.py: {error}", file=sys.stderr)
        return 1
    finally:
        progress("")
    if options.json:
        write_json(options.json, found)
    return 0 if found["passed"] else 1


def _endure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    begun = time.perf_counter()
    load = {**load_options(options), "backend": options.backend, "concurrency": options.concurrency}
    with ov_phi3.load(options.model, **load) as pipe:
        run = Run(pipe, options.seed, folder)
        states = [state()]
        for start in range(0, options.requests, FIRST):
            many(run, range(start, min(start + FIRST, options.requests)), options.concurrency)
            states.append(state())
        again = [run.ask(question) for question in QUESTIONS]
    before, early, late = states[0], states[1], states[-1]
    ratio = late["memory_bytes"] / early["memory_bytes"]
    same = again == run.known
    left = {name: late[name] - before[name] for name in ("threads", "python_threads", "handles")}
    passed = not run.faults and same and ratio <= MOST_GROWTH and not any(value > 0 for value in left.values())
    groups = Counter({group: sum(n for k, n in run.counts.items() if k.startswith(group)) for group in _GROUPS})
    print(
        f"{options.requests} requests in {time.perf_counter() - begun:.0f} s on {pipe.device}, {options.backend}, ",
        end="",
    )
    print(f"{options.concurrency} at once: " + ", ".join(f"{n} {group}" for group, n in groups.items()))
    for kind, count in sorted(run.counts.items()):
        print(f"  {kind:<42}{count:>6}")
    mib = [entry["memory_bytes"] / 2**20 for entry in (before, early, late)]
    print(
        f"Memory: {mib[0]:.0f} MiB before, {mib[1]:.0f} after the first {FIRST}, {mib[2]:.0f} at the end: {ratio:.3f}"
    )
    print(f"Threads: {before['threads']} before, {late['threads']} at the end; file handles: ", end="")
    print(f"{before['handles']} before, {late['handles']} at the end")
    print(f"The five fixed questions: {'the same answers' if same else 'OTHER ANSWERS'}")
    for fault in run.faults[:20]:
        print(f"FAULT: {fault}")
    print("passed" if passed else f"FAILED ({len(run.faults)} faults)")
    return {
        "passed": passed,
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


_GROUPS = ("whole", "cancelled", "wrong")

if __name__ == "__main__":
    exit_with(main)
