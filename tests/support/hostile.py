"""Ten thousand hostile cases: run as a program, it attacks the library from outside and tells what got through.

    python tests/hostile.py MODEL [--device CPU] [--cases 10000] [--seed 0] [--only prompts options ...]

Each case is made from a number by the functions below, and answered with the right answer or with an `ov_phi3.Error`
(a `TypeError` for a wrong type) within the deadline. Anything else is printed with the number that makes it again, and
the exit code is 1. At the end a known question gets the answer that it had at the beginning.

The kinds: prompts, messages, options, token ids, model directories, snapshot files, command lines, environment
variables. MODEL should be a tiny one: a case takes milliseconds then.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ov_phi3
from ov_phi3.cli import main as cli
from ov_phi3.kv import snapshot

DEADLINE_S = 30.0  # for one case; a second would do, on a machine that does nothing else
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
KNOWN = [1000, 1001, 1002]


@dataclass
class Attack:
    """Where the cases run, and what came of them."""

    model: Path
    device: str
    pipes: list[ov_phi3.Pipeline]
    folder: Path
    saved: bytes = b""
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self, kind: str, number: int) -> None:
        """One case."""
        draw = random.Random(f"{kind} {number}")
        begun = time.monotonic()
        faulthandler.dump_traceback_later(DEADLINE_S, exit=True)  # a hang ends the program, and says where
        try:
            outcome = KINDS[kind](self, draw)
        except ov_phi3.Error as error:
            outcome = type(error).__name__
            if not str(error):
                self.faults.append(f"{kind} {number}: an error without words: {error!r}")
        except TypeError as error:
            outcome = "TypeError"
            if "incompatible function arguments" in str(error) or "openvino" in str(error):  # raised in a binding
                self.faults.append(f"{kind} {number}: {error!r}")
        except BaseException as error:
            outcome = "FAULT"
            self.faults.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() - begun > DEADLINE_S:
            self.faults.append(f"{kind} {number}: took {time.monotonic() - begun:.0f} s")
        counts = self.outcomes.setdefault(kind, {})
        counts[outcome] = counts.get(outcome, 0) + 1

    def known(self) -> list[list[int]]:
        """The answers to a known question."""
        options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "do_sample": False}
        return [pipe.generate(KNOWN, **options).token_ids for pipe in self.pipes]


# -- making cases ------------------------------------------------------------------------------------------------------

PIECES = (
    "",
    " ",
    "\n",
    "\0",
    "a",
    "<|end|>",
    "<|system|>",
    "<|user|>\n",
    "<|assistant|>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<0x0A>",
    "▁",
    "\ud800",
    "\udfff",
    "\U0001f9d1\u200d\U0001f680",
    "e\u0301" * 3,
    "\u202e",
    "\ufeff",
    "{{ 7 * 7 }}",
    "%s%n",
    "../../etc/passwd",
    "'; DROP TABLE users; --",
    "x" * 300,
    "\r\n\t\v\f",
    "\u2028",
    "\x7f\x80\x9f",
)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-300,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "0",
    "1",
    "stop",
    b"x",
    [],
    [0],
    [-1],
    [1.5],
    ["a", ""],
    (),
    {},
    {"a": 1},
    {1: 2.0},
    {1: math.nan},
    set(),
    object(),
    int,
    np.float32(0.5),
    np.int64(3),
    np.array([1, 2]),
    1j,
)


def text(draw: random.Random) -> str:
    """A string made of what has gone wrong somewhere."""
    made = "".join(draw.choice(PIECES) for _ in range(draw.randrange(6)))
    if draw.random() < 0.3:
        made += "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(20)))
    return made


def odd(draw: random.Random, depth: int = 2) -> Any:
    """A value of any type."""
    choice = draw.random()
    if choice < 0.15:
        return text(draw)
    if choice < 0.25 and depth:
        return [odd(draw, depth - 1) for _ in range(draw.randrange(4))]
    if choice < 0.35 and depth:
        return {text(draw): odd(draw, depth - 1) for _ in range(draw.randrange(3))}
    return draw.choice(ODD)


def ask(attack: Attack, draw: random.Random, prompt: Any, **options: Any) -> str:
    """Give a prompt to one of the pipelines."""
    options.setdefault("max_new_tokens", 1)
    result = draw.choice(attack.pipes).generate(prompt, **options)
    assert len(result.token_ids) <= 300
    return result.finish_reason


def prompts(attack: Attack, draw: random.Random) -> str:
    """Texts, raw texts, and things that are no prompt."""
    kind = draw.random()
    if kind < 0.15:
        return ask(attack, draw, odd(draw))
    if kind < 0.4:
        return ask(attack, draw, ov_phi3.Raw(text(draw)))
    prompt = text(draw)
    if kind < 0.45:
        prompt *= draw.choice([10, 100, 5000])
    pipe = attack.pipes[0]
    ids = pipe.encode(prompt).tolist()
    own = pipe.tokenizer.encode_messages([{"role": "user", "content": ""}]).tolist()
    control = set(pipe.tokenizer.control_tokens.values())
    if sum(i in control for i in ids) != sum(i in control for i in own):
        raise AssertionError(f"user text made a control token: {prompt!r}")
    return ask(attack, draw, prompt)


def messages(attack: Attack, draw: random.Random) -> str:
    """Lists of messages, with wrong keys, roles and contents."""
    made: Any = []
    for _ in range(draw.randrange(5)):
        message: Any = {"role": draw.choice(["user", "system", "assistant", "tool", text(draw)]), "content": text(draw)}
        if draw.random() < 0.3:
            message[draw.choice(["role", "content", "name", "tools", text(draw)])] = odd(draw)
        if draw.random() < 0.1:
            message.pop(draw.choice(list(message)))
        made.append(odd(draw) if draw.random() < 0.1 else message)
    if draw.random() < 0.2:
        chat = draw.choice(attack.pipes).chat(system=odd(draw) if draw.random() < 0.5 else text(draw))
        return chat.send(odd(draw) if draw.random() < 0.3 else text(draw), max_new_tokens=1).finish_reason
    return ask(attack, draw, tuple(made) if draw.random() < 0.1 else made)


def options(attack: Attack, draw: random.Random) -> str:
    """Options of wrong names, types and sizes, and several that contradict each other."""
    names = [*ov_phi3.GenerationConfig.__dataclass_fields__, "timeout", "prefix", "on_prefill", "max_tokens", "config"]
    given: dict[str, Any] = {}
    for _ in range(draw.randint(1, 4)):
        given[draw.choice(names) if draw.random() < 0.95 else text(draw)] = odd(draw)
    if draw.random() < 0.2:
        ov_phi3.GenerationConfig.from_openai(given)
        return "from_openai"
    if draw.random() < 0.2:
        ov_phi3.GenerationConfig.from_hf(given)
        return "from_hf"
    given.setdefault("max_new_tokens", draw.choice([1, 2, 3]))
    if given["max_new_tokens"] is None:
        given["max_new_tokens"] = 1
    return ask(attack, draw, KNOWN, **given)


def ids(attack: Attack, draw: random.Random) -> str:
    """Token ids of wrong sizes, shapes and types."""
    pipe = draw.choice(attack.pipes)
    size = pipe.info.vocab_size
    edge = [0, 1, size - 1, size, -1, 2**31, 2**63, 2**64, -(2**63)]
    made: Any = [draw.choice(edge) if draw.random() < 0.1 else draw.randrange(size) for _ in range(draw.randrange(40))]
    kind = draw.random()
    if kind < 0.2:
        shape = draw.choice([(2, 3), (1, 6), (6, 1), (0,), (6,), ()])
        dtype = draw.choice([np.int8, np.uint64, np.float32, np.int64, bool, object, "U3"])
        made = np.ones(shape, dtype=dtype)
    elif kind < 0.3:
        made.insert(draw.randrange(len(made) + 1), odd(draw))
    elif kind < 0.35:
        made = made * draw.choice([1, 50, 2000])
    result = pipe.generate(made, max_new_tokens=draw.choice([1, 2, 10**6]) if draw.random() < 0.1 else 1, timeout=20)
    assert all(0 <= i < size for i in result.token_ids)
    if draw.random() < 0.3:
        pipe.tokenizer.decode(made)
    return result.finish_reason


def snapshots(attack: Attack, draw: random.Random) -> str:
    """Saved caches with bits flipped, cut, put together from two, or with a header that was made up."""
    data = bytearray(attack.saved)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.6 else draw.randrange(min(len(data), 2500) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.randrange(100))
        elif kind == 3:
            del data[at : at + draw.randrange(1, 200)]
        elif kind == 4:
            data[:8] = draw.choice([0, 1, 2**20, 2**63, len(data)]).to_bytes(8, "little")
        else:
            data[at:] = attack.saved[: len(data) - at]
    path = attack.folder / "hostile.kv"
    path.write_bytes(data)
    pipe = attack.pipes[-1]
    if draw.random() < 0.5:
        found = snapshot.read(path)
        assert bytes(data) == attack.saved, "a damaged snapshot was read"
        return found.kind
    pipe.load_prefix(path) if draw.random() < 0.5 else pipe.load_chat(path)
    assert bytes(data) == attack.saved, "a damaged snapshot was loaded"
    return "loaded"


def directories(attack: Attack, draw: random.Random) -> str:
    """Model directories with files that are cut, empty, exchanged, edited, gone, or folders."""
    target = attack.folder / draw.choice(["m", "a b", "ünï", "模型", "x" * 100])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in attack.model.iterdir():
        os.link(file, target / file.name) if file.suffix == ".bin" else shutil.copy(file, target / file.name)
    names = sorted(p.name for p in target.iterdir())
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(names)
        file = target / name
        kind = draw.randrange(6)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            data = file.read_bytes()
            file.unlink()
            if kind == 0:
                file.write_bytes(data[: draw.randrange(len(data) + 1)])
            elif kind == 1:
                file.write_bytes(b"")
            elif kind == 2:
                file.write_bytes((target / draw.choice([n for n in names if n != name])).read_bytes())
            elif kind == 3:
                file.mkdir()
            elif kind == 4 and file.suffix == ".json":
                found = None
                with contextlib.suppress(ValueError):
                    found = json.loads(data)
                if isinstance(found, dict) and found:
                    found[draw.choice(list(found))] = draw.choice([v for v in ODD[:30] if not isinstance(v, bytes)])
                with contextlib.suppress(TypeError, ValueError):
                    file.write_text(json.dumps(found), encoding="utf-8")
            elif kind == 5:
                cut = draw.randrange(len(data) + 1)
                file.write_bytes(data[:cut] + draw.randbytes(3) + data[cut:])
    try:
        info = ov_phi3.ModelInfo.from_dir(target)
        if draw.random() < 0.25:
            backend = draw.choice(["llm_pipeline", "infer_request"])
            with ov_phi3.load(target, attack.device, backend=backend, context_length=64) as pipe:
                pipe.generate([1, 2, 3], max_new_tokens=1)
            return "loaded"
        return info.family
    finally:
        shutil.rmtree(target, ignore_errors=True)


def commands(attack: Attack, draw: random.Random) -> str:
    """Command lines that are wrong before anything is loaded, or about files that are not there."""
    names = ["generate", "chat", "bench", "devices", "doctor", "export", "cache", "info", "verify", "build", text(draw)]
    flags = ["--help", "--json", "--device", "GPU.9", "--seed", "-1", "--stop", "--", "-", "nothing.kv", text(draw)]
    argv = [draw.choice(names), *(draw.choice([*names, *flags]) for _ in range(draw.randrange(5)))]
    argv = [a.replace("\0", "") for a in argv if a not in ("devices", "doctor", "export")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code in (0, 1, 2), code
    assert "Traceback" not in err.getvalue()
    return f"exit {code}"


def environment(attack: Attack, draw: random.Random) -> str:
    """Environment variables that the library, OpenVINO or Python read."""
    env = dict(os.environ)
    for name in ("HOME", "TMPDIR", "LANG", "NO_COLOR", "TERM", "COLUMNS", "OV_PHI3_CACHE", "XDG_CACHE_HOME"):
        if draw.random() < 0.4:
            env[name] = text(draw).replace("\0", "").encode("utf-8", "replace").decode()
    if draw.random() < 0.3:
        env.pop("HOME", None)
    command = [sys.executable, "-m", "ov_phi3", "cache", "info", str(attack.folder / "whole.kv")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    assert done.returncode in (0, 1), (done.returncode, done.stderr[-300:])
    assert "Traceback" not in done.stderr
    return f"exit {done.returncode}"


KINDS: dict[str, Callable[[Attack, random.Random], str]] = {
    "prompts": prompts,
    "messages": messages,
    "options": options,
    "ids": ids,
    "snapshots": snapshots,
    "directories": directories,
    "commands": commands,
    "environment": environment,
}


def cases(total: int, only: list[str], seed: int) -> Iterator[tuple[str, int]]:
    """Kind and number of each case, mixed."""
    made = [
        (kind, seed + number)
        for kind, share in SHARES.items()
        if kind in only
        for number in range(max(1, round(total * share)))
    ]
    random.Random(seed).shuffle(made)
    return iter(made)


def main() -> int:
    """Attack, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pipes = [
            stack.enter_context(ov_phi3.load(given.model, given.device, backend=backend, context_length=256))
            for backend in ("llm_pipeline", "infer_request")
        ]
        attack = Attack(given.model, given.device, pipes, folder)
        pipes[-1].prefill(list(range(300, 320))).save(folder / "whole.kv")
        attack.saved = (folder / "whole.kv").read_bytes()
        before = attack.known()
        count = 0
        for kind, number in cases(given.cases, given.only, given.seed):
            attack.run(kind, number)
            count += 1
        after = attack.known()
    for kind, found in attack.outcomes.items():
        print(f"{kind}: {dict(sorted(found.items(), key=lambda item: -item[1]))}")
    if before != after:
        attack.faults.append(f"the known question is answered otherwise: {before} before, {after} after")
    for fault in attack.faults[:40]:
        print("FAULT", fault)
    print(f"{count} cases, {len(attack.faults)} faults")
    return 1 if attack.faults else 0


if __name__ == "__main__":
    sys.exit(main())
