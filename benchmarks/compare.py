"""`ov_phi3` beside its peers: the same weights, the same prompts by id, the same number of threads, greedy, in one run.

    python benchmarks/compare.py [MODEL] [--device CPU] [--rounds 5] [--only NAME ...] [--json FILE] [--plot FILE]

Each peer has a process and an environment of its own, which this script makes from the package index; without MODEL it
makes the demo model too. Every round starts all processes anew, and within a round the peers take turns with every
prompt, in an order that is drawn: a drift of the machine's speed meets all of them, and so does the luck of where their
memory lies. A ratio is of two figures that were taken one right after the other. A peer that cannot be set up, or that
fails, is named with its reason.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _environment import BootstrapError, cache_dir, demo_gguf, demo_model, run_installed

if __name__ == "__main__":
    run_installed("matplotlib")

import ov_phi3
from _common import add_model_arguments, exit_with, progress, refusal, write_json
from _comparison import Comparison, comparison_text
from _peers import PEERS, Inputs, Peer, Worker, WorkerError

FIRST_TURN, OTHER_TURNS = 160, 27  # tokens of a system message and a question, and of a short question
REST_S = 0.25
"""Before every request: the threads of the peer before may still spin for a while, and would slow down the next one."""


@dataclass
class Run:
    """What was measured so far.

    Attributes:
        samples: by figure, by peer: one value per repetition, None where a peer has none.
        dropped: peers that could not be measured, with the reason.
        ids: by peer, the ids of every reply, to see whose are equal.
        about: by peer, its versions.
    """

    samples: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, figure: str, found: Mapping[str, float | None]) -> None:
        """Note one repetition of a figure, the values of all peers."""
        rows = self.samples.setdefault(figure, {peer.name: [] for peer in PEERS})
        for name, row in rows.items():
            row.append(found.get(name))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="MODEL in Hugging Face format, for onnxruntime-genai")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="MODEL as a GGUF file, for llama.cpp")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256, 1024], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens per reply")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that all processes start anew")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="replies per length and round")
    parser.add_argument("--chat-turns", type=int, default=10, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per physical core")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(peer.name for peer in PEERS[1:])}")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), metavar="FILE", help="default: %(default)s")
    return parser.parse_args()


def inputs(options: argparse.Namespace) -> Inputs:
    """The model in every form that there is; without one on the command line, the demo model."""
    if options.model is not None:
        return Inputs(options.model, options.hf, options.gguf)
    return Inputs(demo_model("int4"), demo_model("hf"), demo_gguf())


def prepared(options: argparse.Namespace, model: Inputs, run: Run) -> dict[str, tuple[Peer, Path, Path]]:
    """The peers that can run, each with its interpreter and its model; the reasons of the others are noted."""
    found = {}
    for peer in PEERS:
        wanted = peer is PEERS[0] or not options.only or peer.name in options.only
        if not wanted:
            run.dropped[peer.name] = "left out by --only"
        elif options.device.partition(".")[0] not in peer.devices:
            run.dropped[peer.name] = f"set up here for {', '.join(peer.devices)} only, not for {options.device}"
        else:
            try:
                found[peer.name] = (peer, *peer.prepare(model))
            except BootstrapError as error:
                run.dropped[peer.name] = str(error)
    return found


class Round:
    """All peers, each in a process of its own."""

    def __init__(
        self, peers: Mapping[str, tuple[Peer, Path, Path]], load: dict[str, Any], run: Run, draw: random.Random
    ) -> None:
        self._peers, self._load, self._run, self._draw = peers, load, run, draw
        self._workers: dict[str, Worker] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _present(self) -> list[str]:
        names = [name for name in self._peers if name not in self._run.dropped]
        self._draw.shuffle(names)
        return names

    def ask(self, do: str, **request: Any) -> dict[str, dict[str, Any]]:
        """The same request to all, one after the other, in an order that is drawn; one that fails is dropped."""
        answers: dict[str, dict[str, Any]] = {}
        for name in self._present():
            self._ask(name, answers, do, **request)
        return answers

    def start(self) -> dict[str, dict[str, Any]]:
        """Start and load all; the time of each, while no other one works."""
        answers: dict[str, dict[str, Any]] = {}
        for name in self._present():
            peer, python, model = self._peers[name]
            log = cache_dir() / "logs" / f"peer-{Path(peer.script).stem}.log"
            worker = self._workers[name] = Worker(peer, python, log)
            self._stack.callback(worker.close)
            self._ask(name, answers, "load", model=str(model), **self._load)
        return answers

    def _ask(self, name: str, answers: dict[str, dict[str, Any]], do: str, **request: Any) -> None:
        time.sleep(REST_S)
        try:
            answers[name] = self._workers[name].ask(do, **request)
        except WorkerError as error:
            self._run.dropped[name] = str(error)


def measure(options: argparse.Namespace, peers: Mapping[str, tuple[Peer, Path, Path]], run: Run, info: Any) -> None:
    """All rounds."""
    draw = random.Random(options.seed)
    special = {token.id for token in info.added_tokens}
    ordinary = [i for i in range(info.vocab_size) if i not in special]

    def prompt(tokens: int) -> list[int]:
        return draw.choices(ordinary, k=tokens)

    window = max(*options.prompt_tokens, FIRST_TURN + options.chat_turns * (OTHER_TURNS + 32)) + options.new_tokens + 1
    load = {"device": options.device, "threads": options.threads, "window": window}
    for number in range(1, options.rounds + 1):
        progress(f"round {number} of {options.rounds}: loading")
        with Round(peers, load, run, draw) as group:
            started = group.start()
            run.about.update({name: answer["versions"] for name, answer in started.items()})
            run.add("start", {name: answer["import_ms"] + answer["load_ms"] for name, answer in started.items()})
            for tokens in options.prompt_tokens:  # kernels are chosen per shape: not measured
                group.ask("reply", ids=prompt(tokens), new_tokens=2)
            for repetition, tokens in _plan(options):
                progress(f"round {number} of {options.rounds}: {tokens} tokens, {repetition} of {options.repeat}")
                _note_replies(run, tokens, group.ask("reply", ids=prompt(tokens), new_tokens=options.new_tokens))
            if options.chat_turns:
                progress(f"round {number} of {options.rounds}: chat")
                turns = [prompt(OTHER_TURNS if turn else FIRST_TURN) for turn in range(options.chat_turns)]
                _note_chat(run, group.ask("chat", turns=turns, new_tokens=32), options.chat_turns)
            peaks = {name: answer["peak_bytes"] for name, answer in group.ask("memory").items()}
            run.add("memory", peaks)
    progress("")


def _plan(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Repetitions and prompt lengths; the lengths take turns."""
    for repetition in range(1, options.repeat + 1):
        for tokens in options.prompt_tokens:
            yield repetition, tokens


def _note_replies(run: Run, tokens: int, answers: Mapping[str, dict[str, Any]]) -> None:
    run.add(f"ttft_{tokens}", {name: answer["token_ms"][0] for name, answer in answers.items()})
    run.add(f"tpot_{tokens}", {name: _tpot(answer["token_ms"]) for name, answer in answers.items()})
    for name, answer in answers.items():
        run.ids.setdefault(name, []).append(answer["ids"])


def _note_chat(run: Run, answers: Mapping[str, dict[str, Any]], turns: int) -> None:
    for turn in range(turns):
        run.add(f"chat_{turn + 1}", {name: answer["turns"][turn]["token_ms"][0] for name, answer in answers.items()})


def _tpot(times: list[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def main() -> int:
    """Set up, measure, print, draw, write."""
    options = parse_arguments()
    known = {peer.name for peer in PEERS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(f"compare.py: --only {unknown[0]}: expected one of {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    run = Run()
    try:
        machine = ov_phi3.Machine.here()
        options.threads = options.threads or machine.cores or machine.logical_cpus
        if problem := refusal(options, needs_model=False):
            print(f"compare.py: {problem}", file=sys.stderr)
            return 2
        model = inputs(options)
        options.model = model.exported
        info = ov_phi3.ModelInfo.from_dir(model.exported)
        measure(options, prepared(options, model, run), run, info)
        roofline = ov_phi3.Roofline.measure(info, options.device)
    except (ov_phi3.Error, BootstrapError) as error:
        progress("")
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    comparison = Comparison.of(run, PEERS, vars(options), machine, info, roofline)
    print(comparison_text(comparison))
    if options.json:
        write_json(options.json, comparison.to_dict())
    from _plots import plot_comparison

    print(f"\n{plot_comparison(comparison, options.plot)}")
    return 0


if __name__ == "__main__":
    exit_with(main)
