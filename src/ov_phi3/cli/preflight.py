"""Checks of a command's options before its model is loaded, which can take half a minute.

NumPy and the backends are imported when a check needs them: `ov-phi3 --help` and completion do without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ov_phi3.backends.protocol import BACKENDS
from ov_phi3.cli import terminal
from ov_phi3.errors import ConfigError, SnapshotError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.contradictions import check_resolved

__all__ = [
    "check_files",
    "check_fits",
    "check_reply",
    "check_streams",
    "check_timeout",
    "contradict",
    "warn_of_unused_seed",
]

_SAVED_AS = {"prefix": "--prefix takes it", "chat": "`ov-phi3 chat --load` takes it"}


def check_reply(args: argparse.Namespace, config: GenerationConfig, saved: Sequence[Path | None] = ()) -> str:
    """Check the options of a reply against the model's files and the backend; return the backend that runs it.

    Args:
        args: the command line.
        config: its generation options.
        saved: files with saved KV caches that the command continues from.

    Raises:
        ConfigError: options that contradict each other, do not fit the model, or that no backend supports.
        ModelError: the model directory cannot be used.
    """
    from ov_phi3.backends.registry import backend_spec, backends_with
    from ov_phi3.model.info import ModelInfo

    info = ModelInfo.from_dir(args.model)
    window = args.context_length or info.context_length
    properties = terminal.properties(args.ov_config)
    check_fits(config, window, info.vocab_size)
    resolved = config.resolve(room=window)
    check_resolved(resolved)
    possible = backends_with("saves_kv") if any(path is not None for path in saved) else list(BACKENDS)
    if args.draft_model is not None:
        properties["draft_model"] = str(args.draft_model)
        possible.sort(key=lambda name: not backend_spec(name).capabilities.plans_drafts)
    if args.backend is not None and args.backend not in possible:
        raise ConfigError(f"backend={args.backend!r} cannot continue from a saved KV cache; use {possible[0]}.")
    problems = []
    for backend in [args.backend] if args.backend else possible:
        if (problem := backend_spec(backend).unsupported(resolved, properties)) is None:
            return str(backend)
        problems.append(problem)
    raise ConfigError(problems[0])


def check_fits(config: GenerationConfig, window: int, vocab_size: int) -> None:
    """Check lengths and token ids.

    Raises:
        ConfigError: a length beyond the context window, or an id beyond the vocabulary.
    """
    from ov_phi3.engine.limits import check_ids

    for name in ("max_new_tokens", "min_new_tokens", "max_length"):
        if (value := getattr(config, name) or 0) > window - (name != "max_length"):
            raise ConfigError(f"{name}={value} does not fit the context window of {window} tokens, prompt included.")
    check_ids(config, vocab_size)


def check_streams(config: GenerationConfig) -> None:
    """Refuse several replies at once, which cannot be streamed.

    Raises:
        ConfigError: beams or several samples.
    """
    if config.is_multi_sequence:
        several = "num_beams" if (config.num_beams or 1) > 1 else "num_return_sequences"
        raise ConfigError(
            f"{config.show(several)} does not work in a chat, whose replies stream; use `ov-phi3 generate`."
        )


def check_files(prefix: Path | None, chat: Path | None = None) -> None:
    """Check that files with saved KV caches are there, whole, and of the right kind.

    Raises:
        SnapshotError: one is not.
    """
    from ov_phi3.kv import snapshot

    for path, kind in ((prefix, "prefix"), (chat, "chat")):
        if path is None:
            continue
        saved = snapshot.read(path, verify=False)  # loading compares the checksums of the tensors
        if saved.kind != kind:
            raise SnapshotError(f"{path} holds a {saved.kind}, not a {kind}; {_SAVED_AS[saved.kind]}.")


def check_timeout(args: argparse.Namespace) -> None:
    """Check `--timeout`.

    Raises:
        ConfigError: it is not above 0.
    """
    from ov_phi3.engine.limits import seconds

    if args.timeout is not None:
        seconds("timeout", args.timeout)


def contradict(args: argparse.Namespace, pairs: Sequence[tuple[str, str, str]]) -> None:
    """Refuse flags that exclude each other.

    Args:
        args: the command line.
        pairs: names of two arguments, and the reason.

    Raises:
        ConfigError: both of a pair were given.
    """
    for one, other, reason in pairs:
        if getattr(args, one) not in (None, False) and getattr(args, other) not in (None, False):
            flags = ["--" + name.replace("_", "-") for name in (one, other)]
            raise ConfigError(f"{flags[0]} and {flags[1]} contradict each other: {reason}.")


def warn_of_unused_seed(config: GenerationConfig, defaults: GenerationConfig) -> None:
    """Print a warning about a seed that has no effect.

    Args:
        config: the options of the command line.
        defaults: the model's own options.
    """
    if config.seed is not None and not config.merged_over(defaults).samples:
        terminal.note(
            f"warning: --seed {config.seed} has no effect: the reply is greedy. "
            "Sampling begins with --temperature, for instance."
        )
