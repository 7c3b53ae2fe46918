"""From a Hugging Face model to a directory that `ov_phi3.load` takes: optimum-cli, with checks before and after."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from math import gcd
from pathlib import Path
from typing import Any

from ov_phi3._version import __version__
from ov_phi3.errors import ConfigError, ExportError, ModelError
from ov_phi3.exporting import verify
from ov_phi3.exporting.child import Progress, ProgressLine, bootstrap, child_environment, run
from ov_phi3.exporting.flags import FLAGS, RECIPES, TASK, Flag, Flags, Recipe, arguments, combine, group_size_channels
from ov_phi3.exporting.source import Source, check_space, find_source, hub_revision
from ov_phi3.exporting.workspace import Workspace, check_output
from ov_phi3.files import write_atomically
from ov_phi3.model.config import Phi3Config
from ov_phi3.model.files import UNFINISHED, check_files, listing
from ov_phi3.model.info import MANIFEST, ModelInfo
from ov_phi3.system import versions

__all__ = ["FLAGS", "RECIPES", "Flag", "Progress", "ProgressLine", "Recipe", "export"]

_log = logging.getLogger("ov_phi3")

_OPTIMUM_CLI = "from optimum.commands.optimum_cli import main; main()"
_CONVERT_TOKENIZER = "from openvino_tokenizers.cli_tools.convert_tokenizer import convert_hf_tokenizer as m; m()"
_VERIFY = f"sys.path.append({str(Path(__file__).parent.parent)!r}); from ov_phi3.exporting.verify import main; main()"
_HUB_CONFIG = """
from huggingface_hub import hf_hub_download
print("ov_phi3-config: " + hf_hub_download(sys.argv[1], "config.json", cache_dir=sys.argv[2] or None), flush=True)
"""

_PACKAGES = ("optimum-intel", "optimum", "nncf", "transformers", "tokenizers", "torch", *versions.OPENVINO_PACKAGES)
_GROUPED = ("int4", "nf4", "cb4")
_SMALL = 16 * 2**20

_HINTS = (
    (r"No space left on device", "The disk is full."),
    (r"MemoryError|bad_alloc|DefaultCPUAllocator", "Memory ran out: close other programs, or use a larger machine."),
    (r"InvalidGroupSizeError", 'Pass group_size_fallback="adjust".'),
    (r"GatedRepo|401 Client|403 Client", "The model needs a login or an accepted licence: `hf auth login`."),
    (r"RepositoryNotFound|not a valid model identifier|404 Client", "Check the spelling of the model's name."),
    (
        r"Connect(ion)?Error|LocalEntryNotFound|MaxRetryError|offline mode|Name or service|client has been closed",
        "The hub cannot be reached: check the network, or download the model elsewhere and pass its directory.",
    ),
)


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: str = "int4",
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Callable[[ProgressLine], object] | None = None,
    **flags: Any,
) -> ModelInfo:
    """Export a Phi-3 class model to OpenVINO with `optimum-cli export openvino`, in a subprocess.

    Everything is written to a hidden directory beside `output` and renamed at the end; an export that fails or is
    killed leaves nothing behind that looks like a model. The result is verified by loading it, and `ov_phi3.json` in it
    tells how it was made.

    Args:
        source: a directory with a Hugging Face model, or a name on the hub (`"microsoft/Phi-3-mini-4k-instruct"`).
        output: the directory to make.
        recipe: "int4" (the cookbook's: int4 and int8 mixed 60 to 40, symmetric, group size 128), "int4-max" (all int4),
            "int8", "fp16" or "fp32"; see `RECIPES`.
        trust_remote_code: run Python code that comes with the model. Phi-3 needs none.
        overwrite: replace a model that is in `output` already; nothing else is ever replaced.
        progress: called with each line of progress as it comes, ours and optimum-cli's; see `ProgressLine`. Default:
            the lines go to the logger "ov_phi3" at level INFO. `progress=print` shows them.
        flags: flags of optimum-cli, with underscores, added to the recipe's or overriding them: `group_size=64`,
            `awq=True`; False or None takes one away. If the recipe's own group size does not divide the model's widths,
            `group_size_fallback="adjust"` is added, and the manifest says so.

    Returns:
        what is in `output`.

    Raises:
        ConfigError: unknown recipe or flag, or flags that contradict each other or do not fit the model.
        ModelError: the source is missing, incomplete, or of another architecture.
        ExportError: the `export` extra is not installed, the output is taken, there is no room, or the export failed.
        TypeError: an argument of a wrong type.
    """
    job = _Job(recipe, combine(recipe, flags), trust_remote_code, progress)
    _check_installed(job.flags)
    found = find_source(source)
    target = check_output(output, Path(found.name) if found.local else None, overwrite=overwrite)
    with Workspace(target) as work:
        job.prepare(found, work, explicit_group_size=flags.get("group_size") is not None)
        job.convert(work)
        job.complete_tokenizer(work)
        job.verify(work)
        job.write_manifest(work)
        work.install()
    job.say(f"Exported to {target} in {time.monotonic() - job.started:.0f} s.")
    return ModelInfo.from_dir(target)


def _log_line(line: ProgressLine) -> None:
    if not line.transient:
        _log.info("%s", line)


class _Job:
    """One export: what was decided, and the steps in their order."""

    def __init__(self, recipe: str, flags: Flags, trust: bool, progress: Progress | None) -> None:
        if not isinstance(trust, bool):
            raise TypeError(f"trust_remote_code is {trust!r}; expected True or False, not {type(trust).__name__}")
        self.recipe, self.flags, self.trust = recipe, flags, trust
        self.started, self.time = time.monotonic(), datetime.now(timezone.utc)
        self.source = Source("", local=False)
        self.group_size: dict[str, Any] | None = None
        self.checks: list[str] = []
        self._progress: Progress = progress or _log_line

    def say(self, text: str) -> None:
        self._progress(ProgressLine(text, ours=True))

    def prepare(self, source: Source, work: Workspace, *, explicit_group_size: bool) -> None:
        """Decide everything that can be decided before optimum-cli starts."""
        if self.trust:
            self.say(
                "trust_remote_code is on: code from the model's repository will run. Phi-3 models need none of it."
            )
        self.source = source if source.local else self._ask_hub(source, work)
        if self.source.config is not None:
            self.group_size = decide_group_size(self.flags, self.source.config, explicit=explicit_group_size)
            if self.group_size is not None and self.group_size.get("adjusted"):
                self.flags["group_size_fallback"] = "adjust"
                self.say(f"Group size: {self.group_size['reason']}")
        if warning := check_space(self.source, self.flags, work.root):
            self.say(warning)

    def _ask_hub(self, source: Source, work: Workspace) -> Source:
        """Fetch `config.json` first: a wrong name or architecture shows in a second, not after a long download."""
        self.say(f"{source.name}: no such directory here, looking it up on the Hugging Face hub")
        found: list[str] = []

        def listen(line: ProgressLine) -> None:
            if line.startswith("ov_phi3-config: "):
                found.append(line.partition(": ")[2])

        command = [*bootstrap(_HUB_CONFIG, work.root), source.name, self.flags.get("cache_dir", "")]
        code, tail = run(command, child_environment(work.scratch), listen)
        if code or not found:
            raise ExportError(_failure(f"config.json of {source.name!r} cannot be fetched", code, tail))
        return replace(source, config=Phi3Config.read(Path(found[0])), revision=hub_revision(Path(found[0])))

    def command(self) -> list[str]:
        """The arguments of optimum-cli, less the output directory."""
        trust = ["--trust-remote-code"] if self.trust else []
        return ["export", "openvino", "--model", self.source.name, "--task", TASK, *trust, *arguments(self.flags)]

    def convert(self, work: Workspace) -> None:
        self.say(shlex.join(["optimum-cli", *self.command()]))
        code, tail = run(
            [*bootstrap(_OPTIMUM_CLI, work.root), *self.command(), str(work.model)],
            child_environment(work.scratch),
            self._progress,
        )
        if code:
            raise ExportError(_failure("optimum-cli failed", code, tail))
        if "openvino_model.xml" not in listing(work.model):
            raise ExportError(_failure("optimum-cli ended without an error, and wrote no model", code, tail))

    def complete_tokenizer(self, work: Workspace) -> None:
        """optimum-cli exits with 0 even where it could not convert the tokenizer: try once more, and see why."""
        needed = {"openvino_tokenizer.xml", "openvino_detokenizer.xml"}
        if needed <= listing(work.model).keys():
            return
        self.say("optimum-cli left the tokenizer out; trying convert_tokenizer")
        origin = self.source.name if self.source.local else str(work.model)
        command = [*bootstrap(_CONVERT_TOKENIZER, work.root), origin, "--with-detokenizer"]
        command += ["-o", str(work.model), *(["--trust-remote-code"] if self.trust else [])]
        code, tail = run(command, child_environment(work.scratch), self._progress)
        if not needed <= listing(work.model).keys():
            raise ExportError(
                _failure(
                    "The model was exported, but its tokenizer cannot be converted: OpenVINO Tokenizers needs a "
                    "tokenizer.json that transformers loads as it is",
                    code,
                    tail,
                )
            )

    def verify(self, work: Workspace) -> None:
        self.say("Verifying the result")

        def listen(line: ProgressLine) -> None:
            if line.startswith(verify.RESULT):
                self.checks = json.loads(line.removeprefix(verify.RESULT))

        try:
            check_files(work.model, listing(work.model))
        except ModelError as error:
            raise ExportError(f"optimum-cli left files out: {error}") from error
        code, tail = run([*bootstrap(_VERIFY, work.root), str(work.model)], child_environment(work.scratch), listen)
        if code or not self.checks:
            raise ExportError(_failure("The export finished, but its result does not load", code, tail))

    def write_manifest(self, work: Workspace) -> None:
        files = {name: size for name, size in sorted(listing(work.model).items()) if name != UNFINISHED}
        manifest = {
            "format": 1,
            "source": self.source.name,
            "revision": self.source.revision,
            "recipe": self.recipe,
            "flags": {"task": TASK, **self.flags, "trust_remote_code": self.trust},
            "command": ["optimum-cli", *self.command()],
            "group_size": self.group_size,
            "versions": {
                "ov_phi3": __version__,
                "python": platform.python_version(),
                **{name: version for name in _PACKAGES if (version := versions.package_version(name))},
            },
            "started": self.time.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "verified": self.checks,
            "files": files,
            "sha256": {name: _sha256(work.model / name) for name, size in files.items() if size <= _SMALL},
        }
        try:
            with write_atomically(work.model / MANIFEST) as file:
                file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise ExportError(f"{MANIFEST} cannot be written: {error.strerror or error}.") from error


def decide_group_size(flags: Mapping[str, Any], config: Phi3Config, *, explicit: bool) -> dict[str, Any] | None:
    """Whether the group size fits the model, before NNCF finds out after half a minute.

    Returns:
        for the manifest: "group_size", "channels", "reason", and "adjusted" if `group_size_fallback="adjust"` is to be
        added (layers that the size does not divide then get the largest power of two that does, or int8 below 32);
        None where there are no groups.

    Raises:
        ConfigError: the caller's own group size does not divide a width, and no fallback was named.
    """
    size = flags.get("group_size", 128 if flags.get("weight_format") != "cb4" else -1)
    if flags.get("weight_format") not in _GROUPED or size == -1:
        return None
    channels = group_size_channels(config)
    decision: dict[str, Any] = {"group_size": size, "channels": channels, "adjusted": False}
    misfits = [f"{name} = {width}" for name, width in channels.items() if width % size]
    if not misfits:
        return {**decision, "reason": f"{size} divides {', '.join(str(width) for width in channels.values())}."}
    problem = f"{size} does not divide {', '.join(misfits)}"
    fallback = flags.get("group_size_fallback")
    if fallback not in (None, "error"):
        return {**decision, "reason": f"{problem}; group_size_fallback={fallback!r} was asked for."}
    if explicit or fallback == "error":
        sizes = ", ".join(str(valid) for valid in _valid_group_sizes(size, channels)) or "none of 16 or more"
        raise ConfigError(
            f"group_size is {size}, but {problem}. Nearest sizes that fit: {sizes}; or -1 (one group per row), or "
            'group_size_fallback="adjust" to let single layers differ.'
        )
    return {**decision, "adjusted": True, "reason": f'{problem}; group_size_fallback="adjust" is used.'}


def _valid_group_sizes(wanted: int, channels: Mapping[str, int]) -> list[int]:
    common = gcd(*channels.values())
    divisors = [size for size in range(16, common + 1) if common % size == 0]
    powers = [size for size in divisors if size & (size - 1) == 0]
    return sorted(sorted(powers or divisors, key=lambda size: abs(size - wanted))[:3])


def _check_installed(flags: Flags) -> None:
    needed = ["optimum-intel", "transformers", "torch"]
    if flags.get("weight_format") not in ("fp16", "fp32"):
        needed.append("nncf")
    missing = [name for name in needed if versions.package_version(name) is None]
    if missing:
        raise ExportError(
            f'Exporting needs {", ".join(missing)}, not installed here. Fix: pip install "ov-phi3[export]"'
        )


def _failure(what: str, code: int, tail: list[str]) -> str:
    """One line that says what went wrong and what to do, then the end of the output."""
    text = "\n".join(tail)
    reason = tail[-1].strip() if tail else "it wrote nothing"
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, text)), "")
    if code in (-9, 137):
        reason, hint = "it was killed", "Most likely memory ran out: close other programs, or use a larger machine."
    shown = "\n".join(f"  | {line}" for line in tail[-15:])
    return f"{what} (exit code {code}): {reason}" + (f" {hint}" if hint else "") + (f"\n{shown}" if shown else "")


def _sha256(path: Path) -> str:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""
