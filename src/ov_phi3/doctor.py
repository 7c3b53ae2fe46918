"""Checks of this machine, from the installed packages to the first tokens of a model.

`diagnose` never raises and prints nothing. Each result is a `Check` with a finding and, for a problem, a fix. All
information comes through `Sources`, so that a test can reach every branch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ov_phi3.draft_models import read_draft_model
from ov_phi3.draft_trial import DraftTrial, try_draft_model
from ov_phi3.errors import Error
from ov_phi3.model.info import ModelInfo
from ov_phi3.system import versions
from ov_phi3.system.devices import SEE_DOCTOR, DeviceInfo, hint, resolve
from ov_phi3.system.devices import devices as list_devices
from ov_phi3.system.gpu_stack import Obstacle, Probe, gpu_obstacles
from ov_phi3.system.memory import machine_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "CANARY_PROMPT",
    "CANARY_TOKENS",
    "Check",
    "CheckStatus",
    "Sources",
    "default_sources",
    "diagnose",
    "greedy_ids",
    "worst",
]

CheckStatus = Literal["ok", "warning", "error", "skipped"]
"""What a check found."""

CANARY_PROMPT = "What is the capital of France?"
"""A fixed prompt; the greedy reply to it shows whether a device computes correctly."""

CANARY_TOKENS = 8
_GIB = 1024**3
_WEIGHTS = "openvino_model.bin"
_REINSTALL = f"pip install --upgrade --force-reinstall {' '.join(versions.OPENVINO_PACKAGES)}"


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: one to three words: "packages", "opencl loader", "canary".
        status: "ok", "warning" (it works with a limitation), "error" (it does not work) or "skipped" (not requested, or
            not possible here).
        detail: the finding.
        fix: how to fix the problem, or '' without a problem.
    """

    name: str
    status: CheckStatus
    detail: str
    fix: str = ""


def worst(checks: Iterable[Check]) -> CheckStatus:
    """The most severe status of the checks: "error", else "warning", else "ok". Skipped checks do not count."""
    statuses = {check.status for check in checks}
    return "error" if "error" in statuses else "warning" if "warning" in statuses else "ok"


@dataclass(frozen=True)
class Sources:
    """The sources of information for the checks, which a test can replace.

    Attributes:
        probe: questions about the machine.
        devices: lists the devices.
        versions: returns the installed version by package name; raises `Error` if the OpenVINO packages do not match.
        inspect: reads a model directory, as `ModelInfo.from_dir` does.
        canary: (model directory, device name, repeat) -> the greedy token ids of each repetition, from one loaded
            pipeline.
        read_draft: reads the directory of a draft model and compares its vocabulary with that of the model.
        draft_trial: (model directory, device name, directory of the draft model, its device or None) -> its trial.
        environ: environment variables.
        home: the user's home folder.
    """

    probe: Probe
    devices: Callable[[], list[DeviceInfo]]
    versions: Callable[[], Mapping[str, str | None]]
    inspect: Callable[[Path], Any]
    canary: Callable[[Path, str, int], Sequence[list[int]]]
    environ: Mapping[str, str]
    home: Path
    read_draft: Callable[[Path, Any], Any] = read_draft_model
    draft_trial: Callable[[Path, str, Path, str | None], DraftTrial] = try_draft_model


def default_sources() -> Sources:
    """This machine, the installed packages and the public API."""
    return Sources(Probe(), list_devices, _installed_versions, _inspect, greedy_ids, os.environ, Path.home())


def diagnose(
    model_dir: str | os.PathLike[str] | None = None,
    device: str = "AUTO",
    canary: bool | None = None,
    sources: Sources | None = None,
    *,
    draft_model: str | os.PathLike[str] | None = None,
    draft_device: str | None = None,
) -> list[Check]:
    """Run all checks. Never raises: a check that fails to run is an "error" itself.

    Args:
        model_dir: an exported model to check and to run; without it these checks are "skipped".
        device: the device that has to work. A GPU named here has to exist; with "AUTO" it may be missing.
        canary: whether to load the model and generate `CANARY_TOKENS` tokens twice. By default this is done if there is
            a model and no error before. It takes one load, and for a GPU a second one on the CPU.
        sources: the sources of information.
        draft_model: a draft model for the model, to check and to try with it.
        draft_device: its device; default: the model's.

    Returns:
        The checks, each after those that it depends on.
    """
    sources = sources or default_sources()
    path = None if model_dir is None else Path(model_dir)
    draft = None if draft_model is None else Path(draft_model)
    checks = [
        *_guard("python", lambda: [_python()]),
        *_guard("packages", lambda: [_packages(sources)]),
        *_guard("telemetry", lambda: [_telemetry(sources)]),
    ]
    present: list[DeviceInfo] = []
    chosen: list[DeviceInfo] = []
    checks += _guard("devices", lambda: _devices(sources, present))
    checks += _guard("gpu", lambda: _gpu_stack(sources.probe, device, present))
    checks += _guard("device", lambda: _device(sources, device, present, chosen))
    checks += _guard("memory", lambda: [_memory(sources.probe, [path, draft], chosen)])
    checks += _guard("model", lambda: _model(sources, path))
    checks += _guard("draft model", lambda: _draft_model(sources, path, draft, draft_device))
    run_canary = canary if canary is not None else worst(checks) != "error"
    checks += _guard("canary", lambda: [_canary(sources, path, chosen, run=run_canary)])
    if draft is not None:
        trial = None
        if run_canary and path is not None and chosen and worst(checks) != "error":
            trial = functools.partial(sources.draft_trial, path, chosen[0].name, draft, draft_device)
        checks += _guard("draft replies", lambda: [_draft_replies(trial)])
    return checks


def _guard(name: str, run: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks that `run` returns, and its exception as a check."""
    checks: list[Check] = []
    try:
        checks.extend(run())
    except Error as error:
        checks.append(Check(name, "error", str(error), "see the message"))
    except Exception as error:  # noqa: BLE001 - the other checks still have to run
        detail = f"the check itself failed: {type(error).__name__}: {error}"
        checks.append(Check(name, "error", detail, "please report this"))
    return checks


def _python() -> Check:
    detail = f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.maxsize < 2**32:
        return Check("python", "error", f"{detail}, 32 bit", "use a 64-bit Python")
    return Check("python", "ok", detail)


def _packages(sources: Sources) -> Check:
    try:
        installed = sources.versions()
    except Error as error:
        return Check("packages", "error", str(error), _REINSTALL)
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))


def _telemetry(sources: Sources) -> Check:
    # openvino_telemetry takes a missing file, or "1" in it, as consent, and sends nothing if CI=true is set.
    windows = sources.probe.platform == "win32"
    base = Path(sources.environ.get("LOCALAPPDATA", "")) / "Intel Corporation" if windows else sources.home / "intel"
    file = base / "openvino_telemetry"
    if importlib.util.find_spec("openvino_telemetry") is None:
        return Check("telemetry", "ok", "off: openvino-telemetry is not installed")
    if sources.environ.get("CI", "").lower() == "true":
        return Check("telemetry", "ok", "off: CI=true is set")
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace").strip() != "1":
        return Check("telemetry", "ok", f"off: turned off in {file}")
    return Check("telemetry", "ok", "on: importing openvino sends a usage event to Intel", "opt_in_out --opt_out")


def _devices(sources: Sources, present: list[DeviceInfo]) -> Iterator[Check]:
    """Checks of OpenVINO and its devices, which it adds to `present`."""
    try:
        present += sources.devices()
    except Error as error:
        yield Check("openvino", "error", str(error), _REINSTALL)
        return
    yield Check("openvino", "ok", "imports and lists its devices")
    if not present:
        yield Check("devices", "error", "OpenVINO lists no device, not even a CPU", _REINSTALL)
        return
    yield Check("devices", "ok", "; ".join(_describe(info) for info in present))


def _describe(info: DeviceInfo) -> str:
    parts = [str(info)]
    if info.discrete is not None:
        parts.append("discrete" if info.discrete else "integrated")
    if info.memory_bytes:
        parts.append(f"{info.memory_bytes / _GIB:.1f} GiB")
    if info.driver:
        parts.append(f"driver {info.driver}")
    return ", ".join(parts)


def _gpu_stack(probe: Probe, device: str, present: Sequence[DeviceInfo]) -> Iterator[Check]:
    """Checks of the parts between OpenVINO and an Intel GPU; a missing part is an error only if a GPU was named."""
    named = device.strip().upper().startswith("GPU")
    obstacles = {obstacle.layer: obstacle for obstacle in gpu_obstacles(probe)}
    if "platform" in obstacles:
        yield _layer("gpu", obstacles["platform"], "error" if named else "skipped")
        return
    has_gpu = probe.platform == "win32" or "node" not in obstacles
    missing: CheckStatus = "error" if named else "warning" if has_gpu else "skipped"
    if any(info.kind == "GPU" for info in present):
        missing = "warning"  # OpenVINO lists a GPU although this check misses a part
    yield _layer("opencl loader", obstacles.get("loader"), missing, "loads")
    if probe.platform != "win32":
        vendors = ", ".join(path.name for path in probe.intel_opencl_vendors())
        yield _layer("opencl driver", obstacles.get("driver"), missing, f"{vendors} in /etc/OpenCL/vendors")
        yield _layer("render node", obstacles.get("node"), missing, _nodes(probe))
        if "node" not in obstacles:
            yield _layer("gpu permission", obstacles.get("permission"), missing, "this user may open the render node")
    for info in present:
        if info.kind == "GPU" and info.driver is None:
            yield Check("gpu driver", "warning", f"OpenCL gives no driver version for {info}", "update the GPU driver")


def _layer(name: str, obstacle: Obstacle | None, missing: CheckStatus, detail: str = "") -> Check:
    return Check(name, missing, obstacle.problem, obstacle.fix) if obstacle else Check(name, "ok", detail)


def _nodes(probe: Probe) -> str:
    nodes = [(node.name, probe.kernel_module(node)) for node in probe.render_nodes() if probe.is_intel(node)]
    return ", ".join(f"{name} ({module})" if module else name for name, module in nodes)


def _device(sources: Sources, device: str, present: list[DeviceInfo], chosen: list[DeviceInfo]) -> Iterator[Check]:
    """The check of the named device, which it adds to `chosen`."""
    if not present:
        yield Check("device", "skipped", "there is no device to choose from")
        return
    try:
        chosen.append(resolve(device, present, sources.probe))
    except Error as error:
        fix = "choose one of the devices above, or fix the missing parts above"
        yield Check("device", "error", str(error).removesuffix(SEE_DOCTOR), fix)
        return
    advice = hint(chosen[0], present)
    yield Check("device", "warning" if advice else "ok", f"{device} is {_describe(chosen[0])}", advice)


def _memory(probe: Probe, model_dirs: Sequence[Path | None], chosen: Sequence[DeviceInfo]) -> Check:
    memory = machine_memory(probe.root, probe.platform)
    if memory is None:
        return Check("memory", "skipped", "this system does not report its memory")
    detail = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    size = sum(_size(model_dir) for model_dir in model_dirs)
    if not size:
        return Check("memory", "ok", detail)
    detail += f", weights {size / _GIB:.2f} GiB"
    room, where = memory.available, "memory"
    if chosen and chosen[0].discrete and chosen[0].memory_bytes:
        room, where = chosen[0].memory_bytes, f"{chosen[0].name} memory"
        detail += f", {where} {room / _GIB:.1f} GiB"
    if room < size:
        fix = f"the weights do not fit into the {where}: use a smaller export (int4) or close other programs"
        return Check("memory", "error", detail, fix)
    if room < 2 * size:
        fix = (
            f"loading may take twice the weights, which may not fit into the {where}: use int4, or close other programs"
        )
        return Check("memory", "warning", detail, fix)
    return Check("memory", "ok", detail)


def _size(model_dir: Path | None) -> int:
    weights = None if model_dir is None else model_dir / _WEIGHTS
    return weights.stat().st_size if weights is not None and weights.is_file() else 0


def _model(sources: Sources, model_dir: Path | None) -> Iterator[Check]:
    if model_dir is None:
        yield Check("model", "skipped", "no model directory was given")
        return
    info = sources.inspect(model_dir)  # _guard turns a ModelError into a check
    exporter = ", ".join(f"{name} {version}" for name, version in dict(info.exporter_versions).items()) or "unknown"
    detail = f"{info.family}, {info.quantization}, context {info.context_length} tokens, exported by {exporter}"
    yield Check("model", "ok", detail)
    for warning in info.warnings:
        yield Check("model", "warning", str(warning))


def _draft_model(
    sources: Sources, model_dir: Path | None, draft_dir: Path | None, draft_device: str | None
) -> Iterator[Check]:
    """The check whether a draft model can be used, and is small enough to be worth it; none without one."""
    if draft_dir is None:
        if draft_device is not None:
            yield Check("draft model", "error", f"draft_device={draft_device!r} is for one", "give draft_model too")
        return
    if model_dir is None:
        yield Check("draft model", "skipped", "no model directory was given")
        return
    draft = sources.read_draft(draft_dir, sources.inspect(model_dir))  # _guard turns an error into a check
    weights, others = _size(draft_dir), _size(model_dir)
    share = f"{weights / 2**20:,.0f} MiB of weights, {weights / max(1, others):.0%} of the model's"
    detail = (
        f"{draft.family}, {draft.quantization}, context {draft.context_length} tokens, the same vocabulary, {share}"
    )
    fix = "use a draft model of a tenth: its passes must be much cheaper" if 2 * weights > others else ""
    yield Check("draft model", "warning" if fix else "ok", detail, fix)


def _draft_replies(trial: Callable[[], DraftTrial] | None) -> Check:
    """Whether replies with the draft model are the replies without, and what it gains."""
    if trial is None:
        return Check("draft replies", "skipped", "not run: it was not requested, or there are errors to fix first")
    return Check("draft replies", *trial().verdict)


def _canary(sources: Sources, model_dir: Path | None, chosen: Sequence[DeviceInfo], *, run: bool) -> Check:
    if model_dir is None:
        return Check("canary", "skipped", "no model directory was given")
    if not chosen:
        return Check("canary", "skipped", "not run: there is no device to run on")
    if not run:
        return Check("canary", "skipped", "not run: it was not requested, or there are errors to fix first")
    name = chosen[0].name
    first, second = (list(ids) for ids in sources.canary(model_dir, name, 2))
    if not first:
        return Check("canary", "error", f"{name} generated no token for {CANARY_PROMPT!r}", "export the model again")
    if first != second:
        detail = f"{name} generated {first}, then {second} for the same prompt; greedy decoding must repeat"
        return Check(
            "canary", "error", detail, "update the driver and OpenVINO, and delete the compile cache if there is one"
        )
    if chosen[0].kind == "CPU":
        return Check("canary", "ok", f"{name} generated the same {len(first)} tokens twice")
    return _against_cpu(name, first, list(sources.canary(model_dir, "CPU", 1)[0]))


def _against_cpu(name: str, ids: list[int], cpu: list[int]) -> Check:
    pairs = enumerate(zip(ids, cpu, strict=False))
    same = next((index for index, (id_, cpu_id) in pairs if id_ != cpu_id), min(len(ids), len(cpu)))
    if same == 0:
        detail = f"{name} generated {ids}, the CPU {cpu}: not even the first token agrees"
        fix = (
            "the device computes wrong results: update its driver, delete the compile cache, and try "
            "ov_config={'INFERENCE_PRECISION_HINT': 'f32'}"
        )
        return Check("canary", "error", detail, fix)
    detail = f"{name} generated the same {len(ids)} tokens twice, and the first {same} of them are the CPU's"
    if same < len(ids):
        detail += "; a later difference is usually rounding (f16 on the device), not a fault"
    return Check("canary", "ok", detail)


def greedy_ids(model_dir: Path, device: str, repeat: int) -> list[list[int]]:
    """The greedy ids for the canary prompt, generated `repeat` times by one pipeline through the public API."""
    from ov_phi3.loading import load

    with load(model_dir, device=device) as pipe:
        results = [
            pipe.generate(CANARY_PROMPT, max_new_tokens=CANARY_TOKENS, do_sample=False, ignore_eos=True)
            for _ in range(repeat)
        ]
    return [[int(id_) for id_ in result.token_ids] for result in results]


def _installed_versions() -> Mapping[str, str | None]:
    """The installed versions; raises `Error` if the OpenVINO packages do not match."""
    versions.check()
    return versions.installed()


def _inspect(model_dir: Path) -> Any:
    return ModelInfo.from_dir(model_dir)
