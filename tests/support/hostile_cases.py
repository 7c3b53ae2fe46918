"""The hostile cases of each kind: a case is made from a random generator, run, and its outcome returned."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hostile_values import ODD, odd, text

import ov_phi3
from ov_phi3.cli import main as cli
from ov_phi3.kv import snapshot

KNOWN_PROMPT = [1000, 1001, 1002]


@dataclass
class Target:
    """The pipelines and files that the cases use.

    Attributes:
        model: directory of the model.
        device: its device.
        pipes: a pipeline per backend, `infer_request` last.
        folder: a folder for files of the cases; `whole.kv` in it is an intact saved cache.
        saved: the bytes of that file.
    """

    model: Path
    device: str
    pipes: list[ov_phi3.Pipeline]
    folder: Path
    saved: bytes = b""


def ask(target: Target, rng: random.Random, prompt: Any, **options: Any) -> str:
    """Generate a reply with one of the pipelines."""
    options.setdefault("max_new_tokens", 1)
    result = rng.choice(target.pipes).generate(prompt, **options)
    assert len(result.token_ids) <= 300
    return result.finish_reason


def prompts(target: Target, rng: random.Random) -> str:
    """Texts, raw texts, and values that are not prompts."""
    kind = rng.random()
    if kind < 0.15:
        return ask(target, rng, odd(rng))
    if kind < 0.4:
        return ask(target, rng, ov_phi3.Raw(text(rng)))
    prompt = text(rng)
    if kind < 0.45:
        prompt *= rng.choice([10, 100, 5000])
    pipe = target.pipes[0]
    ids = pipe.encode(prompt).tolist()
    own = pipe.tokenizer.encode_messages([{"role": "user", "content": ""}]).tolist()
    control = set(pipe.tokenizer.control_tokens.values())
    if sum(i in control for i in ids) != sum(i in control for i in own):
        raise AssertionError(f"user text made a control token: {prompt!r}")
    return ask(target, rng, prompt)


def messages(target: Target, rng: random.Random) -> str:
    """Lists of messages, with wrong keys, roles and contents."""
    messages: Any = []
    for _ in range(rng.randrange(5)):
        message: Any = {"role": rng.choice(["user", "system", "assistant", "tool", text(rng)]), "content": text(rng)}
        if rng.random() < 0.3:
            message[rng.choice(["role", "content", "name", "tools", text(rng)])] = odd(rng)
        if rng.random() < 0.1:
            message.pop(rng.choice(list(message)))
        messages.append(odd(rng) if rng.random() < 0.1 else message)
    if rng.random() < 0.2:
        chat = rng.choice(target.pipes).chat(system=odd(rng) if rng.random() < 0.5 else text(rng))
        return chat.send(odd(rng) if rng.random() < 0.3 else text(rng), max_new_tokens=1).finish_reason
    return ask(target, rng, tuple(messages) if rng.random() < 0.1 else messages)


def options(target: Target, rng: random.Random) -> str:
    """Options with wrong names, types and sizes, and contradicting ones."""
    names = [*ov_phi3.GenerationConfig.__dataclass_fields__, "timeout", "prefix", "on_prefill", "max_tokens", "config"]
    options: dict[str, Any] = {}
    for _ in range(rng.randint(1, 4)):
        options[rng.choice(names) if rng.random() < 0.95 else text(rng)] = odd(rng)
    if rng.random() < 0.2:
        ov_phi3.GenerationConfig.from_openai(options)
        return "from_openai"
    if rng.random() < 0.2:
        ov_phi3.GenerationConfig.from_hf(options)
        return "from_hf"
    options.setdefault("max_new_tokens", rng.choice([1, 2, 3]))
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = 1
    return ask(target, rng, KNOWN_PROMPT, **options)


def ids(target: Target, rng: random.Random) -> str:
    """Token ids of wrong sizes, shapes and types."""
    pipe = rng.choice(target.pipes)
    size = pipe.info.vocab_size
    edge = [0, 1, size - 1, size, -1, 2**31, 2**63, 2**64, -(2**63)]
    ids: Any = [rng.choice(edge) if rng.random() < 0.1 else rng.randrange(size) for _ in range(rng.randrange(40))]
    kind = rng.random()
    if kind < 0.2:
        shape = rng.choice([(2, 3), (1, 6), (6, 1), (0,), (6,), ()])
        dtype = rng.choice([np.int8, np.uint64, np.float32, np.int64, bool, object, "U3"])
        ids = np.ones(shape, dtype=dtype)
    elif kind < 0.3:
        ids.insert(rng.randrange(len(ids) + 1), odd(rng))
    elif kind < 0.35:
        ids = ids * rng.choice([1, 50, 2000])
    result = pipe.generate(ids, max_new_tokens=rng.choice([1, 2, 10**6]) if rng.random() < 0.1 else 1, timeout=20)
    assert all(0 <= i < size for i in result.token_ids)
    if rng.random() < 0.3:
        pipe.tokenizer.decode(ids)
    return result.finish_reason


def snapshots(target: Target, rng: random.Random) -> str:
    """Saved caches with flipped bits, cuts, insertions, mixed parts or a false header."""
    data = bytearray(target.saved)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 2500) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(100))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            data[:8] = rng.choice([0, 1, 2**20, 2**63, len(data)]).to_bytes(8, "little")
        else:
            data[at:] = target.saved[: len(data) - at]
    path = target.folder / "hostile.kv"
    path.write_bytes(data)
    pipe = target.pipes[-1]
    if rng.random() < 0.5:
        saved = snapshot.read(path)
        assert bytes(data) == target.saved, "a damaged snapshot was read"
        return saved.kind
    pipe.load_prefix(path) if rng.random() < 0.5 else pipe.load_chat(path)
    assert bytes(data) == target.saved, "a damaged snapshot was loaded"
    return "loaded"


def directories(target: Target, rng: random.Random) -> str:
    """Model directories with files that are cut, empty, exchanged, edited, missing, or folders."""
    directory = target.folder / rng.choice(["m", "a b", "ünï", "模型", "x" * 100])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for file in target.model.iterdir():
        os.link(file, directory / file.name) if file.suffix == ".bin" else shutil.copy(file, directory / file.name)
    names = sorted(p.name for p in directory.iterdir())
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(names)
        file = directory / name
        kind = rng.randrange(6)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            data = file.read_bytes()
            file.unlink()
            if kind == 0:
                file.write_bytes(data[: rng.randrange(len(data) + 1)])
            elif kind == 1:
                file.write_bytes(b"")
            elif kind == 2:
                file.write_bytes((directory / rng.choice([n for n in names if n != name])).read_bytes())
            elif kind == 3:
                file.mkdir()
            elif kind == 4 and file.suffix == ".json":
                value = None
                with contextlib.suppress(ValueError):
                    value = json.loads(data)
                if isinstance(value, dict) and value:
                    value[rng.choice(list(value))] = rng.choice([v for v in ODD[:30] if not isinstance(v, bytes)])
                with contextlib.suppress(TypeError, ValueError):
                    file.write_text(json.dumps(value), encoding="utf-8")
            elif kind == 5:
                cut = rng.randrange(len(data) + 1)
                file.write_bytes(data[:cut] + rng.randbytes(3) + data[cut:])
    try:
        info = ov_phi3.ModelInfo.from_dir(directory)
        if rng.random() < 0.25:
            backend = rng.choice(["llm_pipeline", "infer_request"])
            with ov_phi3.load(directory, target.device, backend=backend, context_length=64) as pipe:
                pipe.generate([1, 2, 3], max_new_tokens=1)
            return "loaded"
        return info.family
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def commands(target: Target, rng: random.Random) -> str:
    """Command lines that fail before a model is loaded, or name missing files."""
    names = ["generate", "chat", "bench", "devices", "doctor", "export", "cache", "info", "verify", "build", text(rng)]
    flags = ["--help", "--json", "--device", "GPU.9", "--seed", "-1", "--stop", "--", "-", "nothing.kv", text(rng)]
    argv = [rng.choice(names), *(rng.choice([*names, *flags]) for _ in range(rng.randrange(5)))]
    argv = [a.replace("\0", "") for a in argv if a not in ("devices", "doctor", "export")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code in (0, 1, 2), code
    assert "Traceback" not in err.getvalue()
    return f"exit {code}"


def environment(target: Target, rng: random.Random) -> str:
    """Environment variables that the library, OpenVINO and Python read."""
    env = dict(os.environ)
    for name in ("HOME", "TMPDIR", "LANG", "NO_COLOR", "TERM", "COLUMNS", "OV_PHI3_CACHE", "XDG_CACHE_HOME"):
        if rng.random() < 0.4:
            env[name] = text(rng).replace("\0", "").encode("utf-8", "replace").decode()
    if rng.random() < 0.3:
        env.pop("HOME", None)
    command = [sys.executable, "-m", "ov_phi3", "cache", "info", str(target.folder / "whole.kv")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    assert done.returncode in (0, 1), (done.returncode, done.stderr[-300:])
    assert "Traceback" not in done.stderr
    return f"exit {done.returncode}"


KINDS: dict[str, Callable[[Target, random.Random], str]] = {
    "prompts": prompts,
    "messages": messages,
    "options": options,
    "ids": ids,
    "snapshots": snapshots,
    "directories": directories,
    "commands": commands,
    "environment": environment,
}
