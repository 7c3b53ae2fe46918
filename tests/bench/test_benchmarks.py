"""The benchmark scripts, run as people run them: on the real engine, in processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if not path.name.startswith("_"))


def run(script: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_snapshots(demo_int4: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "snapshots.json"
    sizes = ["--tokens", "40", "--repeat", "2", "--warmup", "0", "--pairs", "1"]
    done = run("snapshots.py", demo_int4, "--device", device, *sizes, "--json", target)
    assert done.returncode == 0, done.stderr
    for said in ("A prefix of 40 tokens", "cold", "ids after loading equal", "TPOT / llm_pipeline's", "peak memory"):
        assert said in done.stdout
    found = json.loads(target.read_text(encoding="utf-8"))
    assert len(found["prefix"]["load_ms"]) == 2
    assert found["prefix"]["equal_ids"] is True
    assert found["peak_bytes"].keys() == {"llm_pipeline", "infer_request"}
    assert found["goals"]["loading / prefilling"][1] is None  # a small model


class TestLatency:
    """`latency.py`."""

    def test_a_device_that_is_not_there_is_not_measured(self, demo_int4: Path) -> None:
        for model in ([], [demo_int4]):
            done = run("latency.py", *model, "--device", "GPU.7")
            assert done.returncode == 2
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert "there is no GPU.7 here" in done.stderr
            assert "CPU (" in done.stderr

    def test_the_default_is_gpu_0(self) -> None:
        import ov_phi3

        if any(device.name == "GPU.0" for device in ov_phi3.devices()):
            pytest.skip("there is a GPU.0 here")
        done = run("latency.py")
        assert done.returncode == 2
        assert "there is no GPU.0 here" in done.stderr

    @pytest.mark.parametrize("device", ["AUTO", "AUTO:GPU,CPU"])
    def test_no_choice_is_left_to_the_machine(self, device: str, demo_int4: Path) -> None:
        done = run("latency.py", demo_int4, "--device", device)
        assert done.returncode == 2
        assert "name one device" in done.stderr

    def test_report_json_and_pictures(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        target = tmp_path / "latency.json"
        sizes = ["--prompt-tokens", "8", "40", "100000", "--new-tokens", "6", "--repeat", "2", "--chat-turns", "2"]
        done = run("latency.py", demo_int4, "--device", device, *sizes, "--json", target, "--plot", tmp_path / "plots")
        assert done.returncode == 0, done.stderr
        assert "left out: 100000 prompt tokens" in done.stdout
        found = json.loads(target.read_text(encoding="utf-8"))
        assert "latency.py" in found["command"]
        assert [m["prompt_tokens"] for m in found["measurements"]] == [8, 40]
        assert all(len(m["samples"]) == 2 for m in found["measurements"])
        pictures = sorted(path.name for path in (tmp_path / "plots").glob("*.png"))
        assert pictures == ["chat.png", "inter-token.png", "latency.png"]

    def test_a_wrong_model_or_option_is_one_line(self, tmp_path: Path, device: str, demo_int4: Path) -> None:
        done = run("latency.py", tmp_path / "none", "--device", device)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        done = run("latency.py", demo_int4, "--device", device, "--repeat", "0")
        assert done.returncode == 2
        assert "repeat=0" in done.stderr


class TestCompare:
    """`compare.py` and what it is made of."""

    def test_two_peers_end_to_end(self, demo_int4: Path, device: str, tmp_path: Path, monkeypatch: Any) -> None:
        """The library beside raw GenAI, each in its process; in this environment, which spares an installation."""
        peers, compare = module("_peers"), module("compare")
        this = Path(sys.executable)
        ours, raw, *others = peers.PEERS
        failing = [_unavailable(peer) for peer in others]
        prepared = [
            _replaced(ours, lambda inputs: (this, inputs.exported)),
            _replaced(raw, lambda inputs: (this, inputs.exported)),
            *failing,
        ]
        monkeypatch.setattr(compare, "PEERS", prepared)
        target, picture = tmp_path / "compare.json", tmp_path / "compare.png"
        sizes = [
            "--prompt-tokens",
            "8",
            "40",
            "--new-tokens",
            "6",
            "--rounds",
            "2",
            "--repeat",
            "2",
            "--chat-turns",
            "2",
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            ["compare.py", str(demo_int4), "--device", device, *sizes, "--json", str(target), "--plot", str(picture)],
        )
        assert compare.main() == 0
        found = json.loads(target.read_text(encoding="utf-8"))
        assert found["peers"] == ["ov_phi3", "openvino_genai"]
        assert found["not_measured"] == {peer.name: "no such package" for peer in others}
        assert found["replies_with_equal_ids"] == {"openvino_genai": {"equal": 8, "of": 8}}
        ratio = found["figures"]["tpot_40"]["ov_phi3_over_peer"]["openvino_genai"]
        assert ratio["count"] == 4
        assert set(found["roofline"]["ov_phi3_of_limit"]) == {"8", "40"}
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_peer_that_fails_is_named_and_the_others_go_on(self, tmp_path: Path) -> None:
        peers = module("_peers")
        script = tmp_path / "peer.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
            "from protocol import serve\n"
            "class P:\n"
            "    modules, packages = ('json',), ()\n"
            "    def load(self, options): print('noise of a native library')\n"
            "    def generate(self, ids, new_tokens, stamp):\n"
            "        if ids == [0]: raise MemoryError('too large')\n"
            "        if ids == [1]: import os; os._exit(7)\n"
            "        for i in range(new_tokens): stamp([i])\n"
            "serve(P())\n"
        )
        peer = peers.Peer("p", str(script), None, ("CPU",), "")
        worker = peers.Worker(peer, Path(sys.executable), tmp_path / "log")
        assert worker.ask("load")["import_ms"] >= 0
        assert worker.ask("reply", ids=[5, 6], new_tokens=3)["ids"] == [0, 1, 2]
        turns = worker.ask("chat", turns=[[5], [6, 7]], new_tokens=2)["turns"]
        assert [turn["prompt_tokens"] for turn in turns] == [1, 1 + 2 + 2]
        with pytest.raises(peers.WorkerError, match="MemoryError: too large"):
            worker.ask("reply", ids=[0], new_tokens=3)
        assert worker.ask("reply", ids=[5], new_tokens=1)["ids"] == [0]
        with pytest.raises(peers.WorkerError, match="exit code 7"):
            worker.ask("reply", ids=[1], new_tokens=1)
        worker.close()

    def test_ratios_are_of_pairs(self) -> None:
        comparison = module("_comparison")
        figure = comparison.Figure(
            "tpot_8", "TPOT", "ms", {"ov_phi3": [1.0, 9.0, 4.0], "peer": [2.0, 10.0, None], "other": []}
        )
        assert figure.ratio("peer").p50 == pytest.approx((0.5 + 0.9) / 2)
        assert figure.ratio("other") is None

    def test_unknown_peers_and_devices_are_refused(self, demo_int4: Path) -> None:
        done = run("compare.py", demo_int4, "--only", "lama.cpp")
        assert (done.returncode, "llama.cpp" in done.stderr) == (2, True)
        done = run("compare.py", demo_int4, "--device", "GPU.7")
        assert done.returncode == 2
        assert "there is no GPU.7 here" in done.stderr


def _replaced(peer: Any, prepare: Any) -> Any:
    from dataclasses import replace

    return replace(peer, prepare=prepare)


def _unavailable(peer: Any) -> Any:
    def prepare(_: Any) -> Any:
        raise module("_peers").BootstrapError("no such package")

    return _replaced(peer, prepare)


def test_levers_hold_a_setting_against_the_defaults(demo_int4: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "levers.json"
    arguments = ["--only", "none", "kv", "--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    done = run("levers.py", demo_int4, "--device", device, *arguments, "--json", target)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text(encoding="utf-8"))["settings"]
    assert [f["setting"] for f in found][:2] == ["the defaults", "the defaults again (noise level)"]
    same = next(f for f in found if f["group"] == "none" and f["tpot_over_default"])
    assert same["replies_with_equal_ids"] == 1
    assert all(1 < f["perplexity"] < 100 for f in found if f["perplexity"] is not None)
    assert not any(f["failed"] for f in found)


def test_perplexity_is_that_of_the_reference(demo_fp32: Path, demo_hf: Path) -> None:
    """The exported graph, fed in pieces, gives the perplexity that transformers gives for the whole text."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    levers = module("levers")
    ids = list(range(1000, 1100))
    found = levers.perplexity(demo_fp32, "CPU", ids, {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"})
    model = AutoModelForCausalLM.from_pretrained(demo_hf, dtype=torch.float32)
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found == pytest.approx(float(loss.exp()), rel=1e-3)


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_endurance(tiny_fp32: Path, device: str, tmp_path: Path, backend: str) -> None:
    target = tmp_path / "endurance.json"
    done = run(
        "endurance.py", tiny_fp32, "--device", device, "--requests", "300", "--backend", backend, "--json", target
    )
    found = json.loads(target.read_text(encoding="utf-8"))
    # Memory is looked at where more requests are made: here kernels for new sizes still come up.
    assert (found["faults"], found["same_answers"]) == ([], True), done.stdout
    assert found["left"]["python_threads"] == found["left"]["handles"] == 0
    groups = {
        group: sum(n for k, n in found["kinds"].items() if k.startswith(group)) for group in ("cancelled", "wrong")
    }
    assert groups == {"cancelled": 100, "wrong": 30}
    assert len(found["states"]) == 4


def test_concurrency(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "concurrency.json"
    sizes = ["--at-once", "3", "--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    done = run("concurrency.py", tiny_fp32, "--device", device, *sizes, "--json", target)
    assert done.returncode == 0, done.stderr
    assert "1, without concurrency=" in done.stdout
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found["samples"].keys() == {"plain", "1", "3"}
    assert found["tokens_per_s_over_one_caller"]["1"] == 1.0
