"""The steps of an export: plan, convert, convert the tokenizer, verify, write the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shlex
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ov_phi3._version import __version__
from ov_phi3.errors import ExportError, ModelError
from ov_phi3.exporting import verify
from ov_phi3.exporting.calibration import is_local
from ov_phi3.exporting.child import Progress, ProgressLine, bootstrap, child_environment, run
from ov_phi3.exporting.failures import explain_failure
from ov_phi3.exporting.flags import TASK, Flags, arguments
from ov_phi3.exporting.group_size import GroupSize, decide_group_size
from ov_phi3.exporting.source import Source, check_full_precision, check_space, hub_revision
from ov_phi3.exporting.workspace import Workspace
from ov_phi3.files import write_atomically
from ov_phi3.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, read_adapter
from ov_phi3.model.config import Phi3Config
from ov_phi3.model.files import UNFINISHED, check_files, listing
from ov_phi3.model.info import MANIFEST
from ov_phi3.system import versions

__all__ = ["CONVERT_TOKENIZER", "HUB_CONFIG", "OPTIMUM_CLI", "VERIFY", "Job"]


def _own_main(module: str) -> str:
    """Python code that runs the main function of a module of this package, which need not be installed."""
    return f"sys.path.append({str(Path(__file__).parents[2])!r}); from ov_phi3.exporting.{module} import main; main()"


# Python code for the subprocesses, see `child.bootstrap`.
OPTIMUM_CLI = "from optimum.commands.optimum_cli import main; main()"
CONVERT_TOKENIZER = "from openvino_tokenizers.cli_tools.convert_tokenizer import convert_hf_tokenizer as m; m()"
VERIFY, CALIBRATED, MERGE = _own_main("verify"), _own_main("calibration"), _own_main("merge")
_FETCHED_LINE = "ov_phi3-fetched: "
HUB_CONFIG = f"""
from huggingface_hub import hf_hub_download
print({_FETCHED_LINE!r} + hf_hub_download(sys.argv[1], "config.json", cache_dir=sys.argv[2] or None), flush=True)
"""

HUB_ADAPTER = f"""
from huggingface_hub import snapshot_download
files = {[ADAPTER_CONFIG, ADAPTER_WEIGHTS]!r}
folder = snapshot_download(sys.argv[1], allow_patterns=files, cache_dir=sys.argv[2] or None)
print({_FETCHED_LINE!r} + folder, flush=True)
"""

_TOKENIZER_FILES = frozenset({"openvino_tokenizer.xml", "openvino_detokenizer.xml"})
_RECORDED_PACKAGES = (
    "optimum-intel",
    "optimum",
    "nncf",
    "peft",
    "transformers",
    "tokenizers",
    "torch",
    *versions.OPENVINO_PACKAGES,
)
_LARGEST_HASHED = 16 * 2**20
"""Files up to this size, in bytes, get a hash in the manifest; hashing gigabytes of weights would take long."""


class Job:
    """One export: its settings, its decisions, and its steps, which are called in their order.

    Args:
        recipe: name of the recipe, for the manifest.
        flags: flags of optimum-cli, the recipe's and the caller's; `plan` may add to them.
        trust_remote_code: whether code from the model's repository may run.
        progress: receives each line of progress.
    """

    def __init__(self, recipe: str, flags: Flags, progress: Progress, *, trust_remote_code: bool) -> None:
        self._recipe, self._flags, self._trust_remote_code = recipe, flags, trust_remote_code
        self._progress = progress
        self._started, self._started_at = time.monotonic(), datetime.now(timezone.utc)
        self._source = Source("", local=False)
        self._adapter: Adapter | None = None
        self._model = ""
        self._group_size: GroupSize | None = None
        self._checks: list[str] = []

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Report progress."""
        self._progress(ProgressLine(text, ours=True))

    def plan(
        self, source: Source, work: Workspace, adapter: Adapter | str | None = None, *, explicit_group_size: bool
    ) -> None:
        """Check and decide everything that is possible before optimum-cli starts.

        Args:
            source: the model.
            work: where to work.
            adapter: an adapter to merge, or its name on the hub.
            explicit_group_size: the caller gave the group size.

        Raises:
            ConfigError: the caller's group size does not fit the model.
            ExportError: the hub cannot be reached, or there is not enough disk or memory.
            ModelError: the model on the hub is of another architecture, or the adapter does not fit the model.
        """
        if self._trust_remote_code:
            self.say("trust_remote_code is on: code from the model's repository will run. Phi-3 models need none.")
        self._source = source if source.local else self._fetch_config(source, work)
        self._model = self._source.name
        self._adapter = self._fetch_adapter(adapter, work) if isinstance(adapter, str) else adapter
        if self._adapter is not None and self._source.config is not None:
            self._adapter.check_fit(self._source.config, self._source.name)
        if self._source.config is not None:
            self._group_size = decide_group_size(self._flags, self._source.config, explicit=explicit_group_size)
            if self._group_size is not None and self._group_size.adjusted:
                self._flags["group_size_fallback"] = "adjust"
                self.say(f"Group size: {self._group_size.reason}")
        if warning := check_space(self._source, self._flags, work.root, merges=self._adapter is not None):
            self.say(warning)

    def _fetch_config(self, source: Source, work: Workspace) -> Source:
        """Download `config.json` first: a wrong name or architecture then fails in a second, not after gigabytes."""
        file = self._fetch(HUB_CONFIG, source.name, "config.json", work)
        config = Phi3Config.read(file)
        check_full_precision(config)
        return dataclasses.replace(source, config=config, revision=hub_revision(file))

    def _fetch_adapter(self, name: str, work: Workspace) -> Adapter:
        return read_adapter(self._fetch(HUB_ADAPTER, name, ADAPTER_CONFIG, work))

    def _fetch(self, code: str, name: str, what: str, work: Workspace) -> Path:
        """The path that a child process printed after it fetched something from the hub."""
        self.say(f"{name}: no such directory here, looking it up on the Hugging Face hub")
        paths: list[Path] = []

        def listen(line: ProgressLine) -> None:
            if line.startswith(_FETCHED_LINE):
                paths.append(Path(line.removeprefix(_FETCHED_LINE)))

        command = [*bootstrap(code, work.root), name, self._flags.get("cache_dir", "")]
        exit_code, output = run(command, child_environment(work.scratch), listen)
        if exit_code or not paths:
            raise ExportError(explain_failure(f"{what} of {name!r} cannot be fetched", exit_code, output))
        return paths[0]

    def _arguments(self) -> list[str]:
        """The arguments of optimum-cli without the output directory."""
        trust = ["--trust-remote-code"] if self._trust_remote_code else []
        return ["export", "openvino", "--model", self._model, "--task", TASK, *trust, *arguments(self._flags)]

    def merge(self, work: Workspace) -> None:
        """Merge the adapter, if there is one, into a copy of the model, which is then converted.

        Raises:
            ExportError: peft failed.
        """
        if self._adapter is None:
            return
        self.say(f"Merging {self._adapter.path}")
        merged = work.scratch / "merged"
        cache, trust = self._flags.get("cache_dir"), self._trust_remote_code
        options = [*(["--cache-dir", cache] if cache else []), *(["--trust-remote-code"] if trust else [])]
        command = [*bootstrap(MERGE, work.root), self._source.name, str(self._adapter.path), str(merged), *options]
        code, output = run(command, child_environment(work.scratch), self._progress)
        if code:
            raise ExportError(explain_failure("The adapter cannot be merged", code, output))
        self._model = str(merged)

    def convert(self, work: Workspace) -> None:
        """Run optimum-cli.

        Raises:
            ExportError: it failed, or wrote no model.
        """
        self.say(shlex.join(["optimum-cli", *self._arguments()]))
        code = CALIBRATED if is_local(self._flags.get("dataset", "auto")) else OPTIMUM_CLI
        command = [*bootstrap(code, work.root), *self._arguments(), str(work.model)]
        exit_code, output = run(command, child_environment(work.scratch), self._progress)
        if exit_code:
            raise ExportError(explain_failure("optimum-cli failed", exit_code, output))
        if "openvino_model.xml" not in listing(work.model):
            problem = "optimum-cli ended without an error, but wrote no model"
            raise ExportError(explain_failure(problem, exit_code, output))

    def convert_tokenizer(self, work: Workspace) -> None:
        """Convert the tokenizer if optimum-cli left it out, which it does with exit code 0.

        Raises:
            ExportError: the tokenizer cannot be converted.
        """
        if listing(work.model).keys() >= _TOKENIZER_FILES:
            return
        self.say("optimum-cli left the tokenizer out; trying convert_tokenizer")
        origin = self._source.name if self._source.local else str(work.model)
        trust = ["--trust-remote-code"] if self._trust_remote_code else []
        command = [
            *bootstrap(CONVERT_TOKENIZER, work.root),
            origin,
            "--with-detokenizer",
            "-o",
            str(work.model),
            *trust,
        ]
        code, output = run(command, child_environment(work.scratch), self._progress)
        if not listing(work.model).keys() >= _TOKENIZER_FILES:
            problem = (
                "The model was exported, but its tokenizer cannot be converted: OpenVINO Tokenizers needs a "
                "tokenizer.json that transformers can load unchanged"
            )
            raise ExportError(explain_failure(problem, code, output))

    def verify(self, work: Workspace) -> None:
        """Load the result in a subprocess.

        Raises:
            ExportError: files are missing, or the result does not load.
        """
        self.say("Verifying the result")

        def listen(line: ProgressLine) -> None:
            if line.startswith(verify.RESULT):
                self._checks = json.loads(line.removeprefix(verify.RESULT))

        try:
            check_files(work.model, listing(work.model))
        except ModelError as error:
            raise ExportError(f"optimum-cli left files out: {error}") from error
        code, output = run([*bootstrap(VERIFY, work.root), str(work.model)], child_environment(work.scratch), listen)
        if code or not self._checks:
            raise ExportError(explain_failure("The export finished, but its result does not load", code, output))

    def write_manifest(self, work: Workspace) -> None:
        """Record how the model was exported, in `ov_phi3.json`.

        Raises:
            ExportError: the file cannot be written.
        """
        text = json.dumps(self._manifest(work.model), indent=2, ensure_ascii=False)
        try:
            with write_atomically(work.model / MANIFEST) as file:
                file.write(f"{text}\n".encode())
        except OSError as error:
            raise ExportError(f"{MANIFEST} cannot be written: {error.strerror or error}.") from error

    def _manifest(self, model: Path) -> dict[str, Any]:
        files = {name: size for name, size in sorted(listing(model).items()) if name != UNFINISHED}
        return {
            "format": 1,
            "source": self._source.name,
            "revision": self._source.revision,
            "adapter": None if self._adapter is None else self._adapter.to_dict(),
            "recipe": self._recipe,
            "flags": {"task": TASK, **self._flags, "trust_remote_code": self._trust_remote_code},
            "command": ["optimum-cli", *self._arguments()],
            "group_size": None if self._group_size is None else dataclasses.asdict(self._group_size),
            "versions": {
                "ov_phi3": __version__,
                "python": platform.python_version(),
                **{name: version for name in _RECORDED_PACKAGES if (version := versions.package_version(name))},
            },
            "started": self._started_at.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "verified": self._checks,
            "files": files,
            "sha256": {name: _sha256(model / name) for name, size in files.items() if size <= _LARGEST_HASHED},
        }


def _sha256(path: Path) -> str:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""
