"""Compare `ov_phi3` with its peers: the same weights, prompts by id and number of threads, greedy, in one run.

    python benchmarks/compare.py [MODEL] [--device CPU] [--rounds 5] [--only NAME ...] [--json FILE] [--plot FILE]

Each peer runs in a process and an environment of its own, which this script makes from the package index. Without MODEL
it makes the demo model too. Every round starts all processes anew. Within a round the peers take turns with every
prompt, in random order, so that a drift of the machine's speed and the placement of memory affect all peers alike. A
ratio compares two figures measured directly one after the other. A peer that cannot be set up, or that fails, is listed
with its reason.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _environment import BootstrapError, cache_dir, demo_gguf, demo_model, run_installed

if __name__ == "__main__":
    run_installed("matplotlib")

import ov_phi3
from _common import add_model_arguments, exit_with, measured_device, progress, refusal, write_json
from _comparison import Comparison, Run
from _comparison_text import comparison_text
from _peers import PEERS, Inputs, Peer, Worker, WorkerError

# Tokens of the first turn (system message and question), of a short question, and of a reply in the chat.
FIRST_TURN, OTHER_TURNS, CHAT_REPLY = 160, 27, 32
REST_S = 0.25
"""Pause before every request: the previous peer's threads may still spin and would slow down the next peer."""

PreparedPeers = Mapping[str, tuple[Peer, Path, Path]]
"""By name: a peer, its interpreter and its model."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="MODEL in Hugging Face format, for onnxruntime-genai")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="MODEL as a GGUF file, for llama.cpp")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256, 1024], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens per reply")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of times that all processes start")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="replies per length and round")
    parser.add_argument("--chat-turns", type=int, default=10, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per physical core")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(peer.name for peer in PEERS[1:])}")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), metavar="FILE", help="default: %(default)s")
    return parser.parse_args()


def find_inputs(options: argparse.Namespace) -> Inputs:
    """The model in every available format; without MODEL, the demo model."""
    if options.model is not None:
        return Inputs(options.model, options.hf, options.gguf)
    return Inputs(demo_model("int4"), demo_model("hf"), demo_gguf())


def prepare_peers(options: argparse.Namespace, model: Inputs, run: Run) -> PreparedPeers:
    """Prepare the peers that can run; the others go to `run.dropped` with their reasons."""
    prepared = {}
    for peer in PEERS:
        selected = peer is PEERS[0] or not options.only or peer.name in options.only
        if not selected:
            run.dropped[peer.name] = "left out by --only"
        elif options.device.partition(".")[0] not in peer.devices:
            run.dropped[peer.name] = f"set up here for {', '.join(peer.devices)} only, not for {options.device}"
        else:
            try:
                prepared[peer.name] = (peer, *peer.prepare(model))
            except BootstrapError as error:
                run.dropped[peer.name] = str(error)
    return prepared


class Round:
    """All peers, each in a process of its own, for one round."""

    def __init__(self, peers: PreparedPeers, load: dict[str, Any], run: Run, rng: random.Random) -> None:
        self._peers, self._load, self._run, self._rng = peers, load, run, rng
        self._workers: dict[str, Worker] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _shuffled_names(self) -> list[str]:
        names = [name for name in self._peers if name not in self._run.dropped]
        self._rng.shuffle(names)
        return names

    def ask(self, do: str, **request: Any) -> dict[str, dict[str, Any]]:
        """Send the same request to all peers, one after the other in random order; a peer that fails is dropped."""
        answers: dict[str, dict[str, Any]] = {}
        for name in self._shuffled_names():
            self._ask(name, answers, do, **request)
        return answers

    def start(self) -> dict[str, dict[str, Any]]:
        """Start and load all peers, one at a time while the others are idle."""
        answers: dict[str, dict[str, Any]] = {}
        for name in self._shuffled_names():
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


def measure(options: argparse.Namespace, peers: PreparedPeers, run: Run, info: ov_phi3.ModelInfo) -> None:
    """Measure all rounds; the samples go to `run`."""
    rng = random.Random(options.seed)
    added = {token.id for token in info.added_tokens}
    ordinary = [i for i in range(info.vocab_size) if i not in added]

    def prompt(tokens: int) -> list[int]:
        return rng.choices(ordinary, k=tokens)

    chat_tokens = FIRST_TURN + options.chat_turns * (OTHER_TURNS + CHAT_REPLY)
    window = max(*options.prompt_tokens, chat_tokens) + options.new_tokens + 1
    load = {"device": options.device, "threads": options.threads, "window": window}
    for number in range(1, options.rounds + 1):
        progress(f"round {number} of {options.rounds}: loading")
        with Round(peers, load, run, rng) as group:
            started = group.start()
            run.versions.update({name: answer["versions"] for name, answer in started.items()})
            run.add("start", {name: answer["import_ms"] + answer["load_ms"] for name, answer in started.items()})
            for tokens in options.prompt_tokens:  # warm-up: kernels are chosen per shape
                group.ask("reply", ids=prompt(tokens), new_tokens=2)
            for repetition, tokens in _repetitions(options):
                progress(f"round {number} of {options.rounds}: {tokens} tokens, {repetition} of {options.repeat}")
                _add_replies(run, tokens, group.ask("reply", ids=prompt(tokens), new_tokens=options.new_tokens))
            if options.chat_turns:
                progress(f"round {number} of {options.rounds}: chat")
                turns = [prompt(OTHER_TURNS if turn else FIRST_TURN) for turn in range(options.chat_turns)]
                _add_chat(run, group.ask("chat", turns=turns, new_tokens=CHAT_REPLY), options.chat_turns)
            peaks = {name: answer["peak_bytes"] for name, answer in group.ask("memory").items()}
            run.add("memory", peaks)
    progress("")


def _repetitions(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Number of the repetition and prompt length; the lengths alternate."""
    for repetition in range(1, options.repeat + 1):
        for tokens in options.prompt_tokens:
            yield repetition, tokens


def _add_replies(run: Run, tokens: int, answers: Mapping[str, dict[str, Any]]) -> None:
    run.add(f"ttft_{tokens}", {name: answer["token_ms"][0] for name, answer in answers.items()})
    run.add(f"tpot_{tokens}", {name: _tpot(answer["token_ms"]) for name, answer in answers.items()})
    for name, answer in answers.items():
        run.ids.setdefault(name, []).append(answer["ids"])


def _add_chat(run: Run, answers: Mapping[str, dict[str, Any]], turns: int) -> None:
    for turn in range(turns):
        run.add(f"chat_{turn + 1}", {name: answer["turns"][turn]["token_ms"][0] for name, answer in answers.items()})


def _tpot(times: list[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def main() -> int:
    """Set up, measure, print, plot, and write the JSON."""
    options = parse_arguments()
    known = {peer.name for peer in PEERS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(f"compare.py: --only {unknown[0]}: expected one of {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    run = Run(tuple(peer.name for peer in PEERS))
    try:
        machine = ov_phi3.Machine.here()
        options.threads = options.threads or machine.cores or machine.logical_cpus
        if problem := refusal(options, needs_model=False):
            print(f"compare.py: {problem}", file=sys.stderr)
            return 2
        model = find_inputs(options)
        options.model = model.exported
        info = ov_phi3.ModelInfo.from_dir(model.exported)
        measure(options, prepare_peers(options, model, run), run, info)
        roofline = ov_phi3.Roofline.measure(info, options.device)
    except (ov_phi3.Error, BootstrapError) as error:
        progress("")
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    comparison = Comparison.of(run, PEERS, vars(options), machine, measured_device(options), info, roofline)
    print(comparison_text(comparison))
    if options.json:
        write_json(options.json, comparison.to_dict())
    from _plots import plot_comparison

    print(f"\n{plot_comparison(comparison, options.plot)}")
    return 0


if __name__ == "__main__":
    exit_with(main)
