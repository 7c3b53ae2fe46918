"""What works and what is missing on this machine, from the packages to the first tokens of a model.

`diagnose` asks and never raises; it prints nothing. Each answer is a `Check` with what was found and, where something
is wrong, what to do. Everything it asks goes through arguments, so that every branch runs in a test.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    "Sources",
    "Status",
    "default_sources",
    "diagnose",
    "greedy_ids",
    "worst",
]

Status = Literal["ok", "warning", "error", "skipped"]
CANARY_PROMPT = "What is the capital of France?"
CANARY_TOKENS = 8
_GIB = 1024**3
_WEIGHTS = "openvino_model.bin"
_REINSTALL = "pip install --upgrade --force-reinstall ov-phi3"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what, in one to three words: "packages", "opencl loader", "canary".
        status: "ok", "warning" (works, but), "error" (does not work) or "skipped" (not asked, or not possible here).
        detail: what was found.
        fix: what to do, or '' when there is nothing to do.

    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def worst(checks: Iterable[Check]) -> Status:
    """The gravest status among the checks: "error", else "warning", else "ok". Skipped checks do not count."""
    found = {check.status for check in checks}
    return "error" if "error" in found else "warning" if "warning" in found else "ok"


@dataclass(frozen=True)
class Sources:
    """Where the answers come from; each has a default and each can be replaced in a test.

    Attributes:
        probe: the machine.
        devices: lists the devices.
        versions: installed version by package name; raises `Error` when the three do not fit together.
        inspect: reads a model directory, as `ModelInfo.from_dir`.
        canary: (model directory, device name, times) -> greedy token ids of each time, from one loaded pipeline.
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


def default_sources() -> Sources:
    """The real machine, the installed packages and the public API."""
    return Sources(Probe(), list_devices, _installed_versions, _inspect, greedy_ids, os.environ, Path.home())


def diagnose(
    model_dir: str | os.PathLike[str] | None = None,
    device: str = "AUTO",
    canary: bool | None = None,
    sources: Sources | None = None,
) -> list[Check]:
    """Look at everything, from the bottom up, and say what was found.

    Args:
        model_dir: an exported model to look at and to try; without it those checks are "skipped".
        device: the device that is meant to work; a GPU named here must be there, with "AUTO" it may be missing.
        canary: whether to load the model and generate `CANARY_TOKENS` tokens twice; by default when there is a model
            and nothing before was an "error". Costs a load, on a GPU one on the CPU too.
        sources: where the answers come from.

    Returns:
        The checks in the order in which things depend on each other. Never raises: a check that fails to run is an
        "error" itself.

    """
    sources = sources or default_sources()
    path = None if model_dir is None else Path(model_dir)
    checks = [
        *_guard("python", lambda: [_python()]),
        *_guard("packages", lambda: [_packages(sources)]),
        *_guard("telemetry", lambda: [_telemetry(sources)]),
    ]
    found: list[DeviceInfo] = []
    chosen: list[DeviceInfo] = []
    checks += _guard("devices", lambda: _devices(sources, found))
    checks += _guard("gpu", lambda: _gpu_stack(sources.probe, device, found))
    checks += _guard("device", lambda: _device(sources, device, found, chosen))
    checks += _guard("memory", lambda: [_memory(sources.probe, path, chosen)])
    checks += _guard("model", lambda: _model(sources, path))
    wanted = canary if canary is not None else worst(checks) != "error"
    checks += _guard("canary", lambda: [_canary(sources, path, chosen, wanted=wanted)])
    return checks


def _guard(name: str, run: Callable[[], Iterable[Check]]) -> list[Check]:
    checks: list[Check] = []
    try:
        checks.extend(run())
    except Error as error:
        checks.append(Check(name, "error", str(error), "as the message says"))
    except Exception as error:  # noqa: BLE001 - a doctor that dies of what it finds helps nobody
        detail = f"the check itself failed: {type(error).__name__}: {error}"
        checks.append(Check(name, "error", detail, "please report this"))
    return checks


def _python() -> Check:
    found = f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.maxsize < 2**32:
        return Check("python", "error", f"{found}, 32 bit", "use a 64-bit Python")
    return Check("python", "ok", found)


def _packages(sources: Sources) -> Check:
    try:
        versions = sources.versions()
    except Error as error:
        return Check("packages", "error", str(error), _REINSTALL)
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _telemetry(sources: Sources) -> Check:
    # openvino_telemetry: no file means consent, "0" in it means none, CI=true sends nothing.
    windows = sources.probe.platform == "win32"
    base = Path(sources.environ.get("LOCALAPPDATA", "")) / "Intel Corporation" if windows else sources.home / "intel"
    file = base / "openvino_telemetry"
    if importlib.util.find_spec("openvino_telemetry") is None:
        return Check("telemetry", "ok", "off: openvino-telemetry is not installed")
    if sources.environ.get("CI", "").lower() == "true":
        return Check("telemetry", "ok", "off: CI=true is set")
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace").strip() != "1":
        return Check("telemetry", "ok", f"off: {file} says so")
    return Check("telemetry", "ok", "on: importing openvino sends a usage event to Intel", "opt_in_out --opt_out")


def _devices(sources: Sources, found: list[DeviceInfo]) -> Iterator[Check]:
    try:
        found += sources.devices()
    except Error as error:
        yield Check("openvino", "error", str(error), _REINSTALL)
        return
    yield Check("openvino", "ok", "imports and lists its devices")
    if not found:
        yield Check("devices", "error", "OpenVINO sees no device, not even a CPU", _REINSTALL)
        return
    yield Check("devices", "ok", "; ".join(_describe(info) for info in found))


def _describe(info: DeviceInfo) -> str:
    parts = [str(info)]
    if info.discrete is not None:
        parts.append("discrete" if info.discrete else "integrated")
    if info.memory_bytes:
        parts.append(f"{info.memory_bytes / _GIB:.1f} GiB")
    if info.driver:
        parts.append(f"driver {info.driver}")
    return ", ".join(parts)


def _gpu_stack(probe: Probe, device: str, found: Sequence[DeviceInfo]) -> Iterator[Check]:
    """The parts between OpenVINO and an Intel GPU; each an error only when a GPU was asked for by name."""
    asked = device.strip().upper().startswith("GPU")
    obstacles = {obstacle.layer: obstacle for obstacle in gpu_obstacles(probe)}
    if "platform" in obstacles:
        yield _layer("gpu", obstacles["platform"], "error" if asked else "skipped")
        return
    present = probe.platform == "win32" or "node" not in obstacles
    missing: Status = "error" if asked else "warning" if present else "skipped"
    if any(info.kind == "GPU" for info in found):
        missing = "warning"  # it works in spite of what we did not find
    yield _layer("opencl loader", obstacles.get("loader"), missing, "loads")
    if probe.platform != "win32":
        vendors = ", ".join(path.name for path in probe.intel_opencl_vendors())
        yield _layer("opencl driver", obstacles.get("driver"), missing, f"{vendors} in /etc/OpenCL/vendors")
        yield _layer("render node", obstacles.get("node"), missing, _nodes(probe))
        if "node" not in obstacles:
            yield _layer("gpu permission", obstacles.get("permission"), missing, "this user may open the render node")
    for info in found:
        if info.kind == "GPU" and info.driver is None:
            yield Check("gpu driver", "warning", f"{info} does not tell its driver's version", "update the GPU driver")


def _layer(name: str, obstacle: Obstacle | None, missing: Status, good: str = "") -> Check:
    return Check(name, missing, obstacle.problem, obstacle.fix) if obstacle else Check(name, "ok", good)


def _nodes(probe: Probe) -> str:
    told = ((node, probe.kernel_module(node)) for node in probe.render_nodes() if probe.is_intel(node))
    return ", ".join(f"{node.name} ({module})" if module else node.name for node, module in told)


def _device(sources: Sources, device: str, found: list[DeviceInfo], chosen: list[DeviceInfo]) -> Iterator[Check]:
    if not found:
        yield Check("device", "skipped", "there is no device to choose from")
        return
    try:
        chosen.append(resolve(device, found, sources.probe))
    except Error as error:
        detail = str(error).removesuffix(SEE_DOCTOR)
        yield Check(
            "device", "error", detail, "choose one of the devices that are there, or mend what is missing above"
        )
        return
    better = hint(chosen[0], found)
    detail = f"{device} is {_describe(chosen[0])}"
    yield Check("device", "warning" if better else "ok", detail, better)


def _memory(probe: Probe, model_dir: Path | None, chosen: Sequence[DeviceInfo]) -> Check:
    memory = machine_memory(probe.root, probe.platform)
    if memory is None:
        return Check("memory", "skipped", "this system does not tell how much memory it has")
    detail = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    size = _size(model_dir)
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
        fix = f"loading may take twice the weights, which the {where} may not hold: use int4, or close other programs"
        return Check("memory", "warning", detail, fix)
    return Check("memory", "ok", detail)


def _size(model_dir: Path | None) -> int:
    weights = None if model_dir is None else model_dir / _WEIGHTS
    return weights.stat().st_size if weights is not None and weights.is_file() else 0


def _model(sources: Sources, model_dir: Path | None) -> Iterator[Check]:
    if model_dir is None:
        yield Check("model", "skipped", "no model directory was given")
        return
    info = sources.inspect(model_dir)  # a ModelError says what is missing, and becomes the check
    exporter = ", ".join(f"{name} {version}" for name, version in dict(info.exporter_versions).items()) or "unknown"
    detail = f"{info.family}, {info.quantization}, context {info.context_length} tokens, exported by {exporter}"
    yield Check("model", "ok", detail)
    for warning in info.warnings:
        yield Check("model", "warning", str(warning))


def _canary(sources: Sources, model_dir: Path | None, chosen: Sequence[DeviceInfo], *, wanted: bool) -> Check:
    if model_dir is None or not chosen or not wanted:
        wish = (
            "there is no device to run on" if not chosen else "it was not asked for, or there are errors to mend first"
        )
        return Check("canary", "skipped", "no model directory was given" if model_dir is None else f"not run: {wish}")
    name = chosen[0].name
    first, second = (list(ids) for ids in sources.canary(model_dir, name, 2))
    if not first:
        return Check("canary", "error", f"{name} gave no token for {CANARY_PROMPT!r}", "export the model again")
    if first != second:
        detail = f"{name} gave {first}, then {second} for the same prompt; greedy decoding must repeat"
        return Check("canary", "error", detail, "update the driver and OpenVINO; a compile cache: delete it")
    if chosen[0].kind == "CPU":
        return Check("canary", "ok", f"{name} gave the same {len(first)} tokens twice")
    return _against_cpu(name, first, list(sources.canary(model_dir, "CPU", 1)[0]))


def _against_cpu(name: str, ids: list[int], cpu: list[int]) -> Check:
    same = next((at for at, (a, b) in enumerate(zip(ids, cpu, strict=False)) if a != b), min(len(ids), len(cpu)))
    if same == 0:
        detail = f"{name} gave {ids}, the CPU {cpu}: not even the first token agrees"
        fix = (
            "the device computes something else: update its driver, delete a compile cache, and try "
            "ov_config={'INFERENCE_PRECISION_HINT': 'f32'}"
        )
        return Check("canary", "error", detail, fix)
    detail = f"{name} gave the same {len(ids)} tokens twice, and the first {same} of them are the CPU's"
    if same < len(ids):
        detail += "; a later difference is usually rounding (f16 on the device), not a fault"
    return Check("canary", "ok", detail)


def greedy_ids(model_dir: Path, device: str, times: int) -> list[list[int]]:
    """Greedy ids of the canary prompt, `times` times from one pipeline, through the public API."""
    from ov_phi3.loading import load

    greedy = {"do_sample": False, "ignore_eos": True}
    with load(model_dir, device=device) as pipe:
        results = [pipe.generate(CANARY_PROMPT, max_new_tokens=CANARY_TOKENS, **greedy) for _ in range(times)]
    return [[int(token) for token in result.token_ids] for result in results]


def _installed_versions() -> Mapping[str, str | None]:
    versions.check()
    return versions.installed()


def _inspect(model_dir: Path) -> Any:
    return ModelInfo.from_dir(model_dir)
