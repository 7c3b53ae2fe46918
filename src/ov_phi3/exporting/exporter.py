"""`export`: from a Hugging Face model to a directory that `ov_phi3.load` takes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ov_phi3.errors import ExportError
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.flags import ExportFlags, Flags, RecipeName, combine
from ov_phi3.exporting.job import Job
from ov_phi3.exporting.source import find_adapter, find_source
from ov_phi3.exporting.workspace import Workspace, check_output
from ov_phi3.model.info import ModelInfo
from ov_phi3.signatures import naming_options
from ov_phi3.system import versions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["REQUIREMENTS", "check_installed", "export"]

REQUIREMENTS = ("optimum-intel>=2.2,<2.3", "nncf>=3.4,<3.5", "transformers>=5.5,<5.6", "peft>=0.21,<0.22")
"""The `export` extra of `pyproject.toml`; it brings torch along."""

_log = logging.getLogger("ov_phi3")


@naming_options(ExportFlags)
def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: RecipeName = "int4",
    *,
    adapter: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Callable[[ProgressLine], object] | None = None,
    **flags: Unpack[ExportFlags],
) -> ModelInfo:
    """Export a Phi-3 class model to OpenVINO with `optimum-cli export openvino`, in a subprocess.

    All files are written to a hidden directory beside `output`, which is renamed at the end; a failed or killed export
    leaves nothing that looks like a model. The result is verified by loading it, and `ov_phi3.json` in it records how
    it was exported.

    Args:
        source: a directory with a Hugging Face model, or a name on the hub (`"microsoft/Phi-3-mini-4k-instruct"`).
        output: the directory to create.
        recipe: "int4" (that of Microsoft's Phi-3 cookbook: 60 % int4, 40 % int8, symmetric, group size 128), "int4-max"
            (all int4), "int4-calibrated" (with scales fitted to a text), "int8", "fp16" or "fp32"; see `flags.RECIPES`.
        adapter: a LoRA adapter to merge into the weights: a folder as peft saves it, or a name on the hub.
        trust_remote_code: run Python code of the model's repository. Phi-3 models need none.
        overwrite: replace a model that exists in `output`. Nothing but a model is ever replaced.
        progress: called with each line of progress, ours and optimum-cli's; see `ProgressLine`. By default the lines
            go to the logger "ov_phi3" at level INFO. `progress=print` shows them.
        flags: flags of optimum-cli, with underscores, over those of the recipe: `group_size=64`, `awq=True`; None
            removes a flag, False a switch. `dataset` may also be a text file, or "python-docs". If the recipe's group
            size does not divide the model's widths, `group_size_fallback="adjust"` is added and recorded.

    Returns:
        The exported model.

    Raises:
        ConfigError: unknown recipe or flag, or flags that contradict each other or do not fit the model.
        ModelError: the source is missing, incomplete, or of another architecture, or the adapter does not fit it.
        ExportError: a package is not installed, the output cannot be used, disk or memory is too small, or the export
            failed.
        TypeError: an argument of a wrong type.
    """
    if not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code is {trust_remote_code!r}; expected True or False")
    combined = combine(recipe, flags)
    check_installed(combined, merges=adapter is not None)
    job = Job(recipe, combined, progress or _log_line, trust_remote_code=trust_remote_code)
    model = find_source(source)
    lora = None if adapter is None else find_adapter(adapter)
    target = check_output(output, Path(model.name) if model.local else None, overwrite=overwrite)
    with Workspace(target) as work:
        job.plan(model, work, lora, explicit_group_size=flags.get("group_size") is not None)
        job.merge(work)
        job.convert(work)
        job.convert_tokenizer(work)
        job.verify(work)
        job.write_manifest(work)
        work.install()
    job.say(f"Exported to {target} in {job.seconds:.0f} s.")
    return ModelInfo.from_dir(target)


def _log_line(line: ProgressLine) -> None:
    if not line.transient:
        _log.info("%s", line)


def check_installed(flags: Flags, *, merges: bool = False) -> None:
    """Check that the packages for an export are installed, and for the merge of an adapter.

    Raises:
        ExportError: some are not; the message names them and the command that installs them.
    """
    needed = ["optimum-intel", "transformers", "torch"]
    if flags.get("weight_format") not in ("fp16", "fp32"):
        needed.append("nncf")
    if merges:
        needed.append("peft")
    missing = [name for name in needed if versions.package_version(name) is None]
    if missing:
        packages = " ".join(f'"{requirement}"' for requirement in REQUIREMENTS)
        raise ExportError(f"Exporting needs {', '.join(missing)}, not installed here. Fix: pip install {packages}")
