"""`ov-phi3 cache build`, `info` and `verify`: KV caches of prompts in files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ov_phi3.bench.table import table
from ov_phi3.cli import terminal
from ov_phi3.cli.texts import STDIN, StandardInput, checked_argument, read_text
from ov_phi3.errors import ConfigError

__all__ = ["add_cache"]


def add_cache(commands: Any) -> None:
    """Add the `cache` command and its three subcommands."""
    parser = commands.add_parser(
        "cache",
        help="KV caches of prompts in files",
        description="Prefill a prompt once, save its KV cache to a file, and continue from the file later.",
    )
    kinds = parser.add_subparsers(
        title="commands", dest="cache_command", metavar="COMMAND", required=True, parser_class=type(parser)
    )
    build = kinds.add_parser("build", help="prefill a prompt and save it", description="Prefill a prompt and save it.")
    terminal.add_load_arguments(build)
    build.add_argument("output", type=Path, help="file to write")
    prompt = build.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--system", metavar="TEXT", help="a system message; - reads it from standard input")
    prompt.add_argument("--messages", type=Path, metavar="FILE", help="a JSON list of {role, content} messages")
    prompt.add_argument(
        "--raw", type=Path, metavar="FILE", help="a text with control tokens; no chat template is applied"
    )
    build.add_argument("--json", action="store_true", help="print a description of the result as JSON")
    build.set_defaults(run=_build)
    info = kinds.add_parser(
        "info", help="describe a file", description="Describe a file by its header, without reading the tensors."
    )
    info.add_argument("file", type=Path, help="a saved prefix or conversation")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)
    verify = kinds.add_parser(
        "verify",
        help="check a file",
        description="Compare all checksums and, with a model, the fingerprint. Exit code 1 if the file cannot be used.",
    )
    verify.add_argument("file", type=Path, help="a saved prefix or conversation")
    verify.add_argument("model", type=Path, nargs="?", help="directory of the model that the file is for")
    verify.set_defaults(run=_verify)


def _build(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args)  # before loading, so that a wrong file fails at once
    with terminal.load(args, "infer_request") as pipe:
        bar = terminal.PrefillBar()
        try:
            prefix = pipe.prefill(prompt, on_prefill=bar)
        finally:
            bar.clear()
        size = prefix.save(args.output)
    if args.json:
        report = {"file": str(args.output), "tokens": len(prefix), "bytes": size, "dtype": prefix.dtype}
        print(json.dumps({**report, "exact": prefix.exact}, indent=2))
    else:
        print(f"{args.output}: {len(prefix)} tokens, {size / 2**20:.1f} MiB as {prefix.dtype}")
    return 0


def _read_prompt(args: argparse.Namespace) -> Any:
    from ov_phi3.text.template import Raw

    if args.system is not None:
        stdin = StandardInput()
        text = stdin.read() if args.system == STDIN else checked_argument("--system", args.system)
        return [{"role": "system", "content": text}]
    source = args.messages or args.raw
    text = read_text(source, StandardInput(), exact=args.raw is not None)
    try:
        prompt = json.loads(text) if args.messages else Raw(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{source} cannot be read: {exc}.") from exc
    if args.messages and not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
        raise ConfigError(f"{source}: expected a JSON list of {{role, content}} messages.")
    return prompt


def _info(args: argparse.Namespace) -> int:
    from ov_phi3.kv import snapshot

    saved = snapshot.read(args.file, verify=False)
    tensors = saved.entry.tensors
    facts: dict[str, Any] = {
        "kind": saved.kind,
        "token ids": len(saved.ids),
        "cached tokens": len(saved.entry.ids) if tensors.arrays else 0,
        "dtype": tensors.dtype,
        "layout": tensors.layout,
        "bytes": saved.size,
        "layers": len(tensors.arrays) // 2,
        "past the LongRoPE boundary": saved.entry.long_rope,
        **saved.fingerprint,
    }
    if saved.conversation is not None:
        facts["turns"] = len(saved.conversation.get("turns", ()))
    if args.json:
        print(json.dumps({name.replace(" ", "_"): value for name, value in facts.items()}, indent=2))
    else:
        print(table([(name, str(value)) for name, value in facts.items()]))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ov_phi3.kv import snapshot
    from ov_phi3.kv.fingerprint import ADAPTERS, check_fingerprint, fingerprint_of
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.template import ChatTemplate

    saved = snapshot.read(args.file)
    if args.model is None:
        print(f"{args.file} is intact.")
        return 0
    info = ModelInfo.from_dir(args.model)
    expected = fingerprint_of(info, ChatTemplate.for_info(info))
    check_fingerprint(saved.fingerprint, expected, str(args.file), but=[ADAPTERS])
    adapters = saved.fingerprint.get(ADAPTERS)
    print(f"{args.file} is intact and fits {info.path}{f' with the adapters {adapters}' if adapters else ''}.")
    return 0
