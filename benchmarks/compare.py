"""Compare `ov_phi3` with its peers: the same weights, prompts by id and number of threads, greedy, in one run.

    python benchmarks/compare.py [MODEL] [--device CPU] [--rounds 5] [--only NAME ...] [--json FILE] [--plot FILE]
    python benchmarks/compare.py --full-size [--layers 32] [--rounds 3] [--only NAME ...] [--markdown FILE]

Each peer runs in a process and an environment of its own, which this script makes from the package index. Without MODEL
it makes the demo model too. Every round starts all processes anew. Within a round the peers take turns with every
prompt, in random order, so that a drift of the machine's speed and the placement of memory affect all peers alike. A
ratio compares two figures measured directly one after the other. A peer that cannot be set up, or that fails, is listed
with its reason. Peers whose processes do not fit into memory together run one after the other within a round.

`--full-size` makes a Phi-3-mini of full width with random weights (`scripts/full_size.py`) in every peer's format.
With 32 layers that took 23 minutes the first time, without onnxruntime-genai's model, and takes 11 GiB of memory and up
to 36 GB of disk space; a round then takes about 50 s for each peer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _environment import BootstrapError, cache_dir, demo_gguf, demo_model, run_installed

if __name__ == "__main__":
    run_installed("matplotlib")

import ov_phi3
from _common import Refused, add_model_arguments, check, exit_with, measured_device, progress, write_json
from _comparison import Comparison, Run
from _comparison_text import comparison_markdown, comparison_text
from _full_size import LAYERS, check_resources, full_size_inputs, full_size_peers
from _peers import PEERS, Inputs, Peer, Worker, WorkerError
from ov_phi3.system.memory import machine_memory

# Tokens of the first turn (system message and question), of a short question, and of a reply in the chat.
FIRST_TURN, OTHER_TURNS, CHAT_REPLY = 160, 27, 32
REST_S = 0.25
"""Pause before every request: the previous peer's threads may still spin and would slow down the next peer."""

DEFAULTS: dict[str, Any] = {
    "prompt_tokens": [32, 256, 1024],
    "new_tokens": 64,
    "rounds": 5,
    "repeat": 3,
    "chat_turns": 10,
}
FULL_SIZE_DEFAULTS = {"prompt_tokens": [32, 256], "new_tokens": 24, "rounds": 3, "repeat": 2, "chat_turns": 0}

MEMORY_PER_FILE_BYTE, MEMORY_BESIDES = 2.4, 2**29
"""Estimate of a process's peak memory: the pages of its files, the weights as its kernels want them, and the rest."""

PreparedPeers = Mapping[str, tuple[Peer, Path, Path]]
"""By name: a peer, its interpreter and its model."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="CPU")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="MODEL in Hugging Face format, for onnxruntime-genai")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="MODEL as a GGUF file, for llama.cpp")
    parser.add_argument("--full-size", action="store_true", help="a full-size Phi-3-mini with random weights")
    parser.add_argument("--layers", type=int, metavar="N", help=f"of the full-size model (default: {LAYERS})")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", metavar="N")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens per reply")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of times that all processes start")
    parser.add_argument("--repeat", type=int, metavar="N", help="replies per length and round")
    parser.add_argument("--chat-turns", type=int, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per physical core")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=_names("{}; with --full-size {}"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: compare.png; none with --full-size")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown to this file")
    options = parser.parse_args()
    for name, value in (FULL_SIZE_DEFAULTS if options.full_size else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _names(text: str) -> str:
    return text.format(*(", ".join(p.name for p in peers[1:]) for peers in (PEERS, full_size_peers(LAYERS))))


def check_arguments(options: argparse.Namespace, peers: Iterable[Peer]) -> None:
    """Raise `Refused` for arguments that cannot be measured, before anything is made."""
    check(options, needs_model=False)
    known = [peer.name for peer in peers]
    for name in options.only or ():
        if name not in known:
            raise Refused(f"--only {name}: expected one of {', '.join(known)}")
    if not options.full_size:
        if options.layers is not None:
            raise Refused(f"--layers {options.layers} is for --full-size; the layers of a MODEL are given.")
        return
    if options.model or options.hf or options.gguf:
        raise Refused("--full-size makes its own model: leave out MODEL, --hf and --gguf.")
    if not 1 <= options.layers <= 999:
        raise Refused(f"--layers {options.layers}: expected 1 to 999")
    check_resources(options.layers, {name for name in known if not options.only or name in options.only})


def find_inputs(options: argparse.Namespace) -> Inputs:
    """The model in every available format; without MODEL, the demo model."""
    if options.full_size:
        return full_size_inputs(options.layers)
    if options.model is not None:
        return Inputs(options.model, options.hf, options.gguf)
    return Inputs(demo_model("int4"), demo_model("hf"), demo_gguf())


def prepare_peers(options: argparse.Namespace, peers: Iterable[Peer], model: Inputs, run: Run) -> PreparedPeers:
    """Prepare the peers that can run; the others go to `run.dropped` with their reasons."""
    prepared = {}
    for number, peer in enumerate(peers):
        selected = not number or not options.only or peer.name in options.only
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
    """Peers whose processes are alive together, for one round."""

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
            self._ask(name, answers, "load", model=str(model), **self._load, **peer.options)
        return answers

    def _ask(self, name: str, answers: dict[str, dict[str, Any]], do: str, **request: Any) -> None:
        time.sleep(REST_S)
        try:
            answers[name] = self._workers[name].ask(do, **request)
        except WorkerError as error:
            self._run.dropped[name] = str(error)


@dataclass(frozen=True)
class Plan:
    """What every peer is asked in a round.

    Attributes:
        number: the round, from 1.
        warm_up: one prompt of each length; kernels are chosen per shape.
        prompts: number of the repetition, length and ids of each reply.
        turns: the ids that each turn of the chat adds.
    """

    number: int
    warm_up: list[list[int]]
    prompts: list[tuple[int, int, list[int]]]
    turns: list[list[int]]

    @classmethod
    def draw(cls, number: int, options: argparse.Namespace, ordinary: list[int], rng: random.Random) -> Plan:
        """Draw the prompts of a round."""

        def prompt(tokens: int) -> list[int]:
            return rng.choices(ordinary, k=tokens)

        return cls(
            number,
            [prompt(tokens) for tokens in options.prompt_tokens],
            [(repetition, tokens, prompt(tokens)) for repetition, tokens in _repetitions(options)],
            [prompt(OTHER_TURNS if turn else FIRST_TURN) for turn in range(options.chat_turns)],
        )


def measure(options: argparse.Namespace, peers: PreparedPeers, run: Run, info: ov_phi3.ModelInfo) -> None:
    """Measure all rounds; the samples go to `run`."""
    rng = random.Random(options.seed)
    added = {token.id for token in info.added_tokens}
    ordinary = [i for i in range(info.vocab_size) if i not in added]
    chat_tokens = FIRST_TURN + options.chat_turns * (OTHER_TURNS + CHAT_REPLY)
    window = max(*options.prompt_tokens, chat_tokens) + options.new_tokens + 1
    load = {"device": options.device, "threads": options.threads, "window": window}
    for number in range(1, options.rounds + 1):
        plan = Plan.draw(number, options, ordinary, rng)
        for together in _fitting(peers, run, rng):
            measure_limits(options.device, together, run)
            with Round(together, load, run, rng) as group:
                measure_round(options, plan, group, run)
    progress("")


def measure_limits(device: str, peers: PreparedPeers, run: Run) -> None:
    """Measure the memory bandwidth before a group starts, and count what a token reads of the exported models."""
    limits: dict[Path, ov_phi3.Roofline] = {}
    for name, (_, _, model) in peers.items():
        if (model / "openvino_model.xml").is_file():
            if model not in limits:
                limits[model] = ov_phi3.Roofline.measure(ov_phi3.ModelInfo.from_dir(model), device)
                run.bandwidths.append(limits[model].bandwidth_bytes_per_s)
            run.traffic[name] = (limits[model].weight_bytes, limits[model].kv_bytes_per_token)


def measure_round(options: argparse.Namespace, plan: Plan, group: Round, run: Run) -> None:
    """Measure the peers of a group with the prompts of a round."""
    at, show = (plan.number, 0), f"round {plan.number} of {options.rounds}"
    progress(f"{show}: loading")
    started = group.start()
    run.versions.update({name: answer["versions"] for name, answer in started.items()})
    run.add("start", {name: answer["import_ms"] + answer["load_ms"] for name, answer in started.items()}, at)
    for ids in plan.warm_up:
        group.ask("reply", ids=ids, new_tokens=2)
    for repetition, tokens, ids in plan.prompts:
        progress(f"{show}: {tokens} tokens, {repetition} of {options.repeat}")
        answers = group.ask("reply", ids=ids, new_tokens=options.new_tokens)
        _add_replies(run, tokens, answers, (plan.number, repetition))
    if plan.turns:
        progress(f"{show}: chat")
        _add_chat(run, group.ask("chat", turns=plan.turns, new_tokens=CHAT_REPLY), len(plan.turns), at)
    run.add("memory", {name: answer["peak_bytes"] for name, answer in group.ask("memory").items()}, at)
    for name, answer in group.ask("traffic").items():  # after the memory: it reads the files
        if answer:
            run.traffic[name] = (answer["weight_bytes"], answer["kv_bytes_per_token"])


def _fitting(peers: PreparedPeers, run: Run, rng: random.Random) -> Iterator[PreparedPeers]:
    """The peers that go on, in random order, in groups whose processes fit into memory together."""
    memory = machine_memory()
    budget = float("inf") if memory is None else 0.7 * memory.available
    names = [name for name in peers if name not in run.dropped]
    rng.shuffle(names)
    group: dict[str, tuple[Peer, Path, Path]] = {}
    total = 0.0
    for name in names:
        needed = MEMORY_PER_FILE_BYTE * _size(peers[name][2]) + MEMORY_BESIDES
        if group and total + needed > budget:
            yield group
            group, total = {}, 0.0
        group[name] = peers[name]
        total += needed
    if group:
        yield group


def _size(model: Path) -> int:
    files = [model] if model.is_file() else [path for path in model.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _repetitions(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Number of the repetition and prompt length; the lengths alternate."""
    for repetition in range(1, options.repeat + 1):
        for tokens in options.prompt_tokens:
            yield repetition, tokens


def _add_replies(run: Run, tokens: int, answers: Mapping[str, dict[str, Any]], at: tuple[int, int]) -> None:
    run.add(f"ttft_{tokens}", {name: answer["token_ms"][0] for name, answer in answers.items()}, at)
    run.add(f"tpot_{tokens}", {name: _tpot(answer["token_ms"]) for name, answer in answers.items()}, at)
    for name, answer in answers.items():
        run.ids.setdefault(name, []).append(answer["ids"])


def _add_chat(run: Run, answers: Mapping[str, dict[str, Any]], turns: int, at: tuple[int, int]) -> None:
    for turn in range(turns):
        times = {name: answer["turns"][turn]["token_ms"][0] for name, answer in answers.items()}
        run.add(f"chat_{turn + 1}", times, at)


def _tpot(times: list[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def main() -> int:
    """Set up, measure, print, plot, and write the JSON."""
    options = parse_arguments()
    if options.full_size:
        options.layers = LAYERS if options.layers is None else options.layers
    peers = full_size_peers(options.layers) if options.full_size else PEERS
    check_arguments(options, peers)
    run = Run(tuple(peer.name for peer in peers))
    machine = ov_phi3.Machine.here()
    options.threads = options.threads or machine.cores or machine.logical_cpus
    model = find_inputs(options)
    options.model = model.exported
    info = ov_phi3.ModelInfo.from_dir(model.exported)
    measure(options, prepare_peers(options, peers, model, run), run, info)
    comparison = Comparison.of(run, peers, vars(options), machine, measured_device(options), info)
    print(comparison_text(comparison))
    if options.json:
        write_json(options.json, comparison.to_dict())
    if options.markdown:
        options.markdown.write_text(comparison_markdown(comparison) + "\n", encoding="utf-8")
    if options.plot or not options.full_size:
        from _plots import plot_comparison

        print(f"\n{plot_comparison(comparison, options.plot or Path('compare.png'))}")
    return 0


if __name__ == "__main__":
    exit_with(main)
