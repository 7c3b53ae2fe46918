"""OpenVINO's GPU plugin on an emulated GPU.0, compared with the CPU: `python scripts/test.py --stage emulated`.

`scripts/emulated_gpu.py` describes the emulation and its limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ov_phi3

pytestmark = pytest.mark.emulated

EMULATED = "(emulated)"
PROMPT = "What is the capital of Japan?"
TOKENS = 24
# No quantization and no float16, so that both devices give the same ids.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> ov_phi3.DeviceInfo:
    """The emulated GPU.0. It is required once OV_PHI3_EMULATED_GPUS is set."""
    if not os.environ.get("OV_PHI3_EMULATED_GPUS"):
        pytest.skip("needs the emulated GPU: python scripts/test.py --stage emulated")
    gpus = [info for info in ov_phi3.devices() if info.name == "GPU.0"]
    assert len(gpus) == 1, f"OpenVINO sees {[str(info) for info in ov_phi3.devices()]}"
    assert EMULATED in gpus[0].full_name
    return gpus[0]


@pytest.fixture(scope="module")
def cpu_ids(gpu: ov_phi3.DeviceInfo, tiny_fp32: Path) -> list[int]:
    return greedy_ids(tiny_fp32, "CPU", "llm_pipeline")


@pytest.fixture(scope="module")
def gpu_pipe(gpu: ov_phi3.DeviceInfo, tiny_fp32: Path) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(tiny_fp32, device="GPU.0", ov_config=EXACT) as pipe:
        yield pipe


def greedy_ids(model: Path, device: str, backend: str) -> list[int]:
    with ov_phi3.load(model, device=device, backend=backend, ov_config=EXACT) as pipe:
        return list(pipe.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False).token_ids)


def run_python(code: str, *arguments: str, **variables: str) -> Any:
    """Run code in a process of its own, with other environment variables; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_devices_lists_an_emulated_gpu(gpu: ov_phi3.DeviceInfo):
    assert gpu.kind == "GPU"
    assert gpu.discrete is ("integrated" not in os.environ["OV_PHI3_EMULATED_GPUS"])
    assert gpu.architecture is not None
    assert gpu.memory_bytes is not None


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_a_greedy_reply_has_the_ids_of_the_cpu(tiny_fp32: Path, cpu_ids: list[int], backend: str):
    assert len(cpu_ids) == TOKENS
    assert greedy_ids(tiny_fp32, "GPU.0", backend) == cpu_ids


def test_a_chat_has_the_ids_of_the_cpu(tiny_fp32: Path, gpu_pipe: ov_phi3.Pipeline):
    def turns(pipe: ov_phi3.Pipeline) -> list[list[int]]:
        chat = pipe.chat(system="Answer in one word.")
        asked = ("First?", "Second?", "Third?")
        return [list(chat.send(text, max_new_tokens=8, do_sample=False).token_ids) for text in asked]

    with ov_phi3.load(tiny_fp32, device="CPU", ov_config=EXACT) as cpu:
        expected = turns(cpu)
    assert turns(gpu_pipe) == expected


def test_auto_is_the_gpu(tiny_fp32: Path):
    with ov_phi3.load(tiny_fp32, device="AUTO", ov_config=EXACT) as pipe:
        assert pipe.device.name == "GPU.0"


def test_auto_is_the_discrete_one_of_two_gpus(tiny_fp32: Path, cpu_ids: list[int]):
    code = f"""if True:
        import json, sys, ov_phi3
        with ov_phi3.load(sys.argv[1], device="AUTO", ov_config={EXACT!r}) as pipe:
            ids = list(pipe.generate({PROMPT!r}, max_new_tokens={TOKENS}, do_sample=False).token_ids)
            found = [[info.name, info.discrete] for info in ov_phi3.devices()]
            print(json.dumps([found, pipe.device.name, pipe.device.full_name, ids]))
    """
    found, name, full_name, ids = run_python(code, str(tiny_fp32), OV_PHI3_EMULATED_GPUS="integrated,discrete")
    assert found == [["CPU", None], ["GPU.0", False], ["GPU.1", True]]
    assert name == "GPU.1"
    assert EMULATED in full_name
    assert ids == cpu_ids


def test_the_commands_devices_and_doctor_run(tiny_fp32: Path):
    def cli(*arguments: str) -> Any:
        code = "import sys; from ov_phi3.cli import main; sys.exit(main())"
        return run_python(code, *arguments, "--json")

    assert EMULATED in json.dumps(cli("devices"))
    arguments = ("doctor", str(tiny_fp32), "--device", "GPU.0", "--no-canary")
    checks = {check["name"]: check for check in cli(*arguments)}
    assert EMULATED in checks["device"]["detail"]
    assert [name for name, check in checks.items() if check["status"] == "error"] == []


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_a_reply_with_default_settings_is_repeatable(tiny_fp32: Path, gpu: ov_phi3.DeviceInfo, backend: str):
    with ov_phi3.load(tiny_fp32, device="GPU.0", backend=backend) as pipe:
        first, second = (pipe.generate(PROMPT, max_new_tokens=8, do_sample=False).token_ids for _ in range(2))
    assert len(first) == 8
    assert first == second


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
@pytest.mark.parametrize("config", [EXACT, {}, {"KV_CACHE_PRECISION": "i8"}, {"KV_CACHE_PRECISION": "u4"}], ids=str)
def test_the_kv_cache_has_the_promised_size(tiny_fp32: Path, tmp_path: Path, config: dict[str, Any], backend: str):
    record, promised = tmp_path / "memory.txt", 1 << 26
    code = f"""if True:
        import sys, ov_phi3
        options = dict(device="GPU.0", ov_config={config!r}, backend={backend!r}, kv_cache_gb={promised} / 2**30)
        with ov_phi3.load(sys.argv[1], **options) as pipe:
            pipe.generate("Hello", max_new_tokens=1)
        print(0)
    """
    run_python(code, str(tiny_fp32), OV_PHI3_EMULATED_MEMORY=str(record))
    allocated = [int(line.split()[1]) for line in record.read_text().splitlines()]
    # Keys and values of 2 layers. Nothing else of this model is as large as a sixth of them.
    caches = [size for size in allocated if size > promised / 6]
    assert len(caches) == 4
    assert 0.95 * promised < sum(caches) <= promised
