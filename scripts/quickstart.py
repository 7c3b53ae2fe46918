"""From a fresh checkout to a reply: make an environment, build the demo model, export it, and ask it a question.

The model is then at `model/demo`, where the README's programs load it.

A second run reuses everything that is current, and needs no network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from _environments import ensure_environment, venv_command, venv_python
from _models import ensure_model
from _paths import ROOT
from _steps import BootstrapError, child_environment, main_of

# The cookbook's question, system message and reply length. A model of this size repeats itself without the penalty.
QUESTION = "can you introduce yourself?"
REPLY = ("--system", "You are a helpful AI assistant.", "--max-new-tokens", "1024", "--repetition-penalty", "1.1")


def _quoted(*parts: str | Path) -> str:
    """Return a command line to paste, also if the path of the checkout has spaces."""
    if sys.platform == "win32":
        return subprocess.list2cmdline([str(part) for part in parts])
    import shlex

    return shlex.join(str(part) for part in parts)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="AUTO", help="CPU, GPU.0, ...; default: the best available device")
    parser.add_argument("--prompt", default=QUESTION, help=f"the question; default: {QUESTION!r}")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment; default: .venv")
    return parser.parse_args()


def link_model(model: Path, link: Path) -> Path:
    """Make a path in the checkout lead to a model in the cache; return it, or the model if something else is there."""
    if _is_link(link):
        if link.resolve() == model.resolve():
            return link
        link.unlink()  # it leads to an older build of the model
    elif link.exists():
        return model
    link.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        # A junction, because a symbolic link needs a privilege there.
        done = subprocess.run(["cmd", "/c", "mklink", "/J", link, model], capture_output=True, check=False)
        if done.returncode != 0:
            raise BootstrapError(f"cannot link {link} to {model}: {done.stderr.decode(errors='replace').strip()}")
    else:
        link.symlink_to(model, target_is_directory=True)
    return link


def _is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link or a junction of Windows, also one that leads nowhere."""
    try:
        path.readlink()
    except OSError:
        return False
    return True


def print_next_steps(venv: Path, model: Path, device: str) -> None:
    """Print commands to try next."""
    command = venv_command(venv, "ov-phi3")
    print("\nWhat to try next")
    print(f"  talk to it:    {_quoted(command, 'chat', model, '--device', device)}")
    print(f"  from Python:   {_quoted(venv_python(venv), ROOT / 'docs' / 'examples' / 'ask.py')}")
    print(f"  run the tests: {_quoted('python', ROOT / 'scripts' / 'test.py')}")


def main() -> int:
    """Make the environment and the model, ask the question, print the next steps."""
    options = parse_arguments()
    began = time.monotonic()
    venv = options.venv.absolute()
    python = ensure_environment(venv, ["export", "quickstart"])
    model = link_model(ensure_model("demo-int4", python), ROOT / "model" / "demo")
    print(f"- ready after {time.monotonic() - began:.0f} s: {model}\n\n> {options.prompt}\n", flush=True)
    # Through the interpreter, not the installed command: the first line of a script breaks on long paths and on paths
    # with spaces.
    command = [python, "-m", "ov_phi3", "generate", model, options.prompt, *REPLY, "--device", options.device]
    done = subprocess.run(command, check=False, env=child_environment())
    if done.returncode == 0:
        print_next_steps(venv, model, options.device)
    return done.returncode


if __name__ == "__main__":
    main_of(main)
