"""Time to first token (TTFT) and per output token (TPOT) of a model on one device, with all that they depend on.

    python benchmarks/latency.py MODEL [--device CPU] [--prompt-tokens 32 256 1024 2048] [--against] [--json FILE]

The default device is GPU.0. No other device is measured in the place of an absent one: the exit code is then 2. Prompts
have exact lengths and fresh content, so no prefix cache shortens a TTFT. The first reply of each length is warm-up and
is discarded. `docs/benchmarks.md` defines every figure. `--against` prints the run beside the figures that OpenVINO has
published for the same model on Intel processors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _environment import run_installed

run_installed("matplotlib")

import ov_phi3  # noqa: E402
from _common import add_load_arguments, add_model_arguments, exit_with, load_options, progress, refusal, write_json  # noqa: E402
from _published import against_dict, against_text  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device="GPU.0")
    add_load_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256, 1024, 2048], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="replies per length (default: %(default)s)")
    parser.add_argument("--ends", choices=["forced", "natural"], default="forced", help="default: %(default)s")
    parser.add_argument("--chat-turns", type=int, default=10, metavar="N", help="0 for no chat (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)")
    parser.add_argument("--against", action="store_true", help="print OpenVINO's published figures beside the run")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="plot latency, gaps and chat turns to PNG files")
    return parser.parse_args()


def lengths_that_fit(lengths: list[int], new_tokens: int, window: int) -> list[int]:
    """The prompt lengths that fit the context window together with a reply; the others are printed."""
    for tokens in lengths:
        if tokens + new_tokens > window:
            print(
                f"left out: {tokens} prompt tokens and {new_tokens} new tokens do not fit the window of {window} tokens"
            )
    return [tokens for tokens in lengths if tokens + new_tokens <= window]


def measure(options: argparse.Namespace) -> ov_phi3.Report:
    """Load the model and measure it."""
    progress("loading")
    try:
        with ov_phi3.load(options.model, **load_options(options)) as pipe:
            return ov_phi3.measure(
                pipe,
                prompt_tokens=lengths_that_fit(options.prompt_tokens, options.new_tokens, pipe.context_length),
                new_tokens=options.new_tokens,
                repeat=options.repeat,
                ends=options.ends,
                chat_turns=options.chat_turns,
                seed=options.seed,
                progress=progress,
            )
    finally:
        progress("")


def main() -> int:
    """Measure, print the report, write JSON and plots."""
    options = parse_arguments()
    try:
        problem = refusal(options)
        if problem is not None:
            print(f"latency.py: {problem}", file=sys.stderr)
            return 2
        report = measure(options)
    except ov_phi3.Error as error:
        print(f"latency.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ov_phi3.ConfigError) else 1
    print(report)
    if options.against:
        print(f"\n{against_text(report)}")
    if options.json:
        write_json(options.json, report.to_dict() | ({"published": against_dict(report)} if options.against else {}))
    if options.plot:
        from _plots import plot_report

        for path in plot_report(report, options.plot):
            print(path)
    return 0


if __name__ == "__main__":
    exit_with(main)
