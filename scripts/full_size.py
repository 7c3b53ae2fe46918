"""Make a Phi-3-mini of full width with random weights, to measure real Phi-3 speed without a download.

It has the real tokenizer, the published sizes (hidden size 3072, 32 heads, a sliding window of 2047) and the given
number of layers; 32 layers are the whole model with 3.8 billion parameters. Its text is noise, its latency is real. The
weights are written layer by layer. The export of 32 layers takes 10.4 GiB of memory and 10 GB of disk space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _environments import ensure_environment
from _models import RECIPES, ensure_model
from _paths import ROOT
from _steps import main_of


def main() -> int:
    """Make the environment, the model and its export, and print its directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="1 to 999 (default: %(default)s)")
    parser.add_argument("--recipe", choices=RECIPES, default="int4", help="default: %(default)s, the cookbook's")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment; default: .venv")
    options = parser.parse_args()
    if not 1 <= options.layers <= 999:
        parser.error(f"--layers {options.layers}: expected 1 to 999")
    python = ensure_environment(options.venv, ["export"])
    print(ensure_model(f"mini{options.layers}-{options.recipe}", python))
    return 0


if __name__ == "__main__":
    main_of(main)
