"""Every check of the doctor, passing and failing, on fake machines and on this one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from doctors import CPU, DGPU, IGPU, INFO, machine, model, named, no_loader, raising, root_of, sources

from ov_phi3.doctor import CANARY_PROMPT, CANARY_TOKENS, Check, diagnose, greedy_ids, worst
from ov_phi3.errors import DeviceError, ModelError
from ov_phi3.system.gpu_stack import Probe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def test_the_most_severe_status() -> None:
    def of(*statuses: Any) -> str:
        return worst(Check("x", status, "") for status in statuses)

    assert of() == "ok"
    assert of("ok", "skipped") == "ok"
    assert of("ok", "warning", "skipped") == "warning"
    assert of("warning", "error", "ok") == "error"


def test_all_checks_pass_on_a_machine_with_a_discrete_gpu(root: Path, tmp_path: Path) -> None:
    checks = diagnose(model(tmp_path), sources=sources(machine(root), [CPU, DGPU]))
    assert {check.status for check in checks} == {"ok"}, checks
    names = [check.name for check in checks]
    assert names == [
        "python",
        "packages",
        "telemetry",
        "openvino",
        "devices",
        "opencl loader",
        "opencl driver",
        "render node",
        "gpu permission",
        "device",
        "memory",
        "model",
        "canary",
    ]
    assert "A770 Graphics (dGPU)), discrete, 16.0 GiB, driver 24.35" in named(checks, "device").detail
    assert "first 8 of them are the CPU's" in named(checks, "canary").detail


def test_a_machine_without_a_gpu_passes_unless_a_gpu_is_named(root: Path) -> None:
    probe = dataclasses.replace(machine(root, gpu=False), load_library=no_loader)
    checks = diagnose(sources=sources(probe))
    assert worst(checks) == "ok"
    assert named(checks, "render node").status == "skipped"
    assert named(checks, "opencl loader").status == "skipped"
    checks = diagnose(device="GPU.0", sources=sources(probe))
    assert {check.name for check in checks if check.status == "error"} == {
        "opencl loader",
        "opencl driver",
        "render node",
        "device",
    }
    assert "CPU (Intel(R) Core(TM) Ultra 7)" in named(checks, "device").detail
    assert "doctor" not in named(checks, "device").detail


@pytest.mark.parametrize(
    ("device", "status"), [("AUTO", "warning"), ("CPU", "warning"), ("GPU.0", "error"), ("gpu", "error")]
)
@pytest.mark.parametrize(
    ("part", "fix"),
    [
        ("opencl loader", "ocl-icd-libopencl1"),
        ("opencl driver", "intel-opencl-icd"),
        ("gpu permission", "usermod -aG"),
    ],
)
def test_a_missing_part_of_the_gpu_stack(root: Path, device: str, status: str, part: str, fix: str) -> None:
    probe = machine(root)
    if part == "opencl loader":
        probe = dataclasses.replace(probe, load_library=no_loader)
    elif part == "gpu permission":
        probe = dataclasses.replace(probe, can_open=lambda _: False)
    else:
        (root / "etc/OpenCL/vendors/intel.icd").unlink()
    check = named(diagnose(device=device, sources=sources(probe)), part)
    assert check.status == status
    assert fix in check.fix


def test_a_missing_part_is_no_error_if_openvino_lists_a_gpu(root: Path) -> None:
    probe = dataclasses.replace(machine(root), load_library=no_loader)
    checks = diagnose(device="GPU.0", sources=sources(probe, [CPU, IGPU]))
    assert named(checks, "opencl loader").status == "warning"
    assert worst(checks) == "warning"


def test_windows_and_macos(root: Path) -> None:
    windows = Probe(root, "win32", no_loader)
    checks = diagnose(sources=sources(windows))
    assert "intel.com" in named(checks, "opencl loader").fix
    assert "render node" not in {check.name for check in checks}
    checks = diagnose(sources=sources(Probe(root, "darwin")))
    assert named(checks, "gpu").status == "skipped"
    assert named(checks, "memory").status == "skipped"


def test_an_integrated_gpu_beside_a_discrete_one_is_a_warning_that_names_the_other(root: Path) -> None:
    check = named(diagnose(device="GPU.0", sources=sources(machine(root), [CPU, IGPU, DGPU])), "device")
    assert check.status == "warning"
    assert "device='GPU.1'" in check.fix


def test_a_gpu_without_a_driver_version(root: Path) -> None:
    gpu = dataclasses.replace(DGPU, driver=None)
    assert named(diagnose(sources=sources(machine(root), [CPU, gpu])), "gpu driver").status == "warning"


def test_packages_that_do_not_match(root: Path) -> None:
    error = DeviceError("openvino 2026.4.1, openvino-genai 2025.3.0: of different releases")
    check = named(diagnose(sources=sources(machine(root), versions=raising(error))), "packages")
    assert check.status == "error"
    assert "different releases" in check.detail
    assert "pip install" in check.fix


def test_openvino_cannot_be_imported_or_lists_no_device(root: Path) -> None:
    checks = diagnose(sources=sources(machine(root), devices=raising(DeviceError("openvino cannot be imported"))))
    assert named(checks, "openvino").status == "error"
    assert named(checks, "device").status == "skipped"
    checks = diagnose(sources=sources(machine(root_of(root)), []))
    assert named(checks, "devices").status == "error"


def test_a_check_that_raises_is_an_error_and_the_others_run(root: Path) -> None:
    checks = diagnose(sources=sources(machine(root), versions=raising(KeyError("x"))))
    assert "KeyError" in named(checks, "packages").detail
    assert named(checks, "device").status == "ok"


@pytest.mark.parametrize("device", ["GPU0", "HETERO:GPU,CPU"])
def test_a_wrong_device_name(root: Path, device: str) -> None:
    assert "Accepted" in named(diagnose(device=device, sources=sources(machine(root))), "device").detail


@pytest.mark.parametrize(("gib", "size_gib", "status"), [(32, 2, "ok"), (3, 2, "warning"), (1, 2, "error")])
def test_memory_is_compared_with_the_weights(root: Path, tmp_path: Path, gib: int, size_gib: int, status: str) -> None:
    probe = machine(root, gpu=False, memory_gib=gib)
    check = named(diagnose(model(tmp_path, size_gib << 30), sources=sources(probe)), "memory")
    assert check.status == status
    assert "weights 2.00 GiB" in check.detail
    assert bool(check.fix) == (status != "ok")


def test_for_a_discrete_gpu_its_own_memory_counts(root: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(DGPU, memory_bytes=1 << 30)
    check = named(diagnose(model(tmp_path, 2 << 30), sources=sources(machine(root), [CPU, small])), "memory")
    assert check.status == "error"
    assert "GPU.1 memory" in check.fix


def test_a_damaged_model_is_an_error_and_the_canary_is_skipped(root: Path, tmp_path: Path) -> None:
    error = ModelError("openvino_tokenizer.xml is missing; export the model again")
    checks = diagnose(model(tmp_path), sources=sources(machine(root), inspect=raising(error)))
    assert "openvino_tokenizer.xml is missing" in named(checks, "model").detail
    assert named(checks, "model").status == "error"
    assert named(checks, "canary").status == "skipped"


def test_each_warning_of_a_model_is_a_check(root: Path, tmp_path: Path) -> None:
    old = SimpleNamespace(**{**vars(INFO), "warnings": ["exported by optimum-intel 1.27: wrong past 4096 tokens"]})
    checks = diagnose(model(tmp_path), sources=sources(machine(root), inspect=lambda _: old))
    assert [check.status for check in checks if check.name == "model"] == ["ok", "warning"]
    assert any("wrong past 4096" in check.detail for check in checks)


def canary_ids(by_device: dict[str, list[list[int]]]) -> Any:
    return lambda _path, device, times: by_device[device][:times]


@pytest.mark.parametrize(
    ("ids", "status", "words"),
    [
        ({"CPU": [[1, 2], [1, 2]]}, "ok", "same 2 tokens twice"),
        ({"CPU": [[1, 2], [1, 3]]}, "error", "greedy decoding must repeat"),
        ({"CPU": [[], []]}, "error", "no token"),
    ],
)
def test_the_canary_on_the_cpu(root: Path, tmp_path: Path, ids: Any, status: str, words: str) -> None:
    check = named(diagnose(model(tmp_path), sources=sources(machine(root), canary=canary_ids(ids))), "canary")
    assert check.status == status
    assert words in check.detail


@pytest.mark.parametrize(
    ("gpu", "cpu", "status", "words"),
    [
        ([7, 8, 9], [7, 8, 9], "ok", "first 3 of them are the CPU's"),
        ([7, 8, 9], [7, 5, 9], "ok", "first 1 of them are the CPU's; a later difference is usually rounding"),
        ([0, 0, 0], [7, 8, 9], "error", "not even the first token agrees"),
    ],
)
def test_the_canary_on_a_gpu_is_compared_with_the_cpu(
    root: Path, tmp_path: Path, gpu: list[int], cpu: list[int], status: str, words: str
) -> None:
    canary = canary_ids({"GPU.1": [gpu, gpu], "CPU": [cpu]})
    check = named(diagnose(model(tmp_path), sources=sources(machine(root), [CPU, DGPU], canary=canary)), "canary")
    assert check.status == status
    assert words in check.detail


def test_a_canary_that_raises_is_an_error_with_its_reason(root: Path, tmp_path: Path) -> None:
    canary = raising(DeviceError("GPU.1: Not enough memory."))
    check = named(diagnose(model(tmp_path), sources=sources(machine(root), [CPU, DGPU], canary=canary)), "canary")
    assert check.status == "error"
    assert "Not enough memory" in check.detail


def test_the_canary_can_be_switched_off(root: Path, tmp_path: Path) -> None:
    canary = raising(AssertionError("must not run"))
    checks = diagnose(model(tmp_path), canary=False, sources=sources(machine(root), canary=canary))
    assert named(checks, "canary").status == "skipped"
    assert named(diagnose(sources=sources(machine(root_of(root)))), "canary").detail == "no model directory was given"


@pytest.mark.parametrize(
    ("environ", "consent", "words"),
    [({}, None, "on:"), ({}, "1", "on:"), ({}, "0", "off:"), ({"CI": "true"}, "1", "off: CI=true")],
)
def test_telemetry(root: Path, environ: dict[str, str], consent: str | None, words: str) -> None:
    pytest.importorskip("openvino_telemetry")
    probe = machine(root)
    if consent is not None:
        (root / "home/intel").mkdir(parents=True)
        (root / "home/intel/openvino_telemetry").write_text(consent)
    check = named(diagnose(sources=sources(probe, environ=environ)), "telemetry")
    assert check.detail.startswith(words)
    assert (check.fix == "opt_in_out --opt_out") == words.startswith("on")


def test_telemetry_not_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ov_phi3.doctor.importlib.util.find_spec", lambda _: None)
    assert "not installed" in named(diagnose(sources=sources(machine(root))), "telemetry").detail


def test_this_machine() -> None:
    """The default sources: no check raises, and the machine that runs the tests passes."""
    checks = diagnose(device="CPU")
    for name in ("python", "packages", "openvino", "devices", "device"):
        assert named(checks, name).status == "ok", checks
    assert "openvino 2026" in named(checks, "packages").detail
    assert named(checks, "canary").status == "skipped"


def test_greedy_ids_go_through_the_public_api_and_close_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Pipe:
        def __enter__(self) -> Pipe:
            return self

        def __exit__(self, *_: object) -> None:
            calls.append("closed")

        def generate(self, prompt: str, **options: Any) -> SimpleNamespace:
            calls.append((prompt, options))
            return SimpleNamespace(token_ids=(1, 2))

    def load(path: Path, *, device: str) -> Pipe:
        calls.append((path, device))
        return Pipe()

    monkeypatch.setattr("ov_phi3.loading.load", load)
    assert greedy_ids(tmp_path, "GPU.0", 2) == [[1, 2], [1, 2]]
    once = (CANARY_PROMPT, {"max_new_tokens": CANARY_TOKENS, "do_sample": False, "ignore_eos": True})
    assert calls == [(tmp_path, "GPU.0"), once, once, "closed"]
