"""The benchmark scripts, run as programs on the real engine."""

from __future__ import annotations

import importlib
import json
import os
import re
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
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_snapshots_measures_prefixes_and_backends(demo_int4: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "snapshots.json"
    sizes = ["--tokens", "40", "--repeat", "2", "--warmup", "0", "--pairs", "1"]
    done = run("snapshots.py", demo_int4, "--device", device, *sizes, "--json", target)
    assert done.returncode == 0, done.stderr
    for part in (
        "A prefix of 40 tokens",
        "cold",
        "ids after loading equal",
        "TPOT after 32 tokens",
        "TTFT after 32 tokens",
        "peak",
    ):
        assert part in done.stdout
    report = json.loads(target.read_text(encoding="utf-8"))
    assert len(report["prefix"]["load_ms"]) == 2
    assert report["prefix"]["equal_ids"] is True
    assert report["device"]["name"] == device
    assert f" on {device} ({report['device']['full_name']})" in done.stdout
    assert report["peak_bytes"].keys() == {"llm_pipeline", "infer_request"}
    assert report["goals"]["loading / prefilling"][1] is None  # a small model


def test_nodes_finds_every_matrix_product_and_its_bytes(demo_int4: Path, tmp_path: Path) -> None:
    from ov_phi3.bench.roofline import weight_bytes_per_token

    target = tmp_path / "nodes.json"
    done = run("nodes.py", demo_int4, "--repeat", "4", "--rows", "1", "3", "--kernels", "--json", target)
    assert done.returncode == 0, done.stderr
    assert "A pass of 3 token(s)" in done.stdout
    assert "all matrix products" in done.stdout
    assert re.search(r"^1, 576, 49152 +[a-z]", done.stdout, re.MULTILINE)
    passes = json.loads(target.read_text(encoding="utf-8"))["passes"]
    assert [one["rows"] for one in passes] == [1, 3]
    products = [part for part in passes[0]["parts"] if part["weight_bytes"]]
    assert sum(part["nodes"] for part in products) == 121  # four in each of 30 layers, and the output layer
    whole = weight_bytes_per_token(demo_int4 / "openvino_model.xml")
    assert 0.98 < sum(part["weight_bytes"] for part in products) / whole <= 1


def test_speculation_compares_a_draft_model_with_lookup_and_none(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "speculation.json"
    size = ["--new-tokens", "6", "--repeat", "2", "--minutes", "0.01", "--only", "plain", "--temperature", "0"]
    done = run("speculation.py", tiny_fp32, "--device", device, "--draft", tiny_fp32, *size, "--json", target)
    assert done.returncode == 0, done.stderr
    assert "draft model over lookup, elsewhere" in done.stdout
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["draft_model"]["path"] == str(tiny_fp32)
    assert [text["source"] for text in report["texts"]] == ["lookup", "draft model"] * 10
    for text in report["texts"]:
        assert len(text["tpot_auto_over_off"]) == text["equal"] >= 1
        assert text["accepted"] <= text["drafted"]
    done = run("speculation.py", tiny_fp32, "--device", device, "--draft-device", "CPU")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "draft_device" in done.stderr


class TestLatency:
    """`latency.py`."""

    def test_a_missing_device_is_refused(self, demo_int4: Path) -> None:
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
    def test_auto_devices_are_refused(self, device: str, demo_int4: Path) -> None:
        done = run("latency.py", demo_int4, "--device", device)
        assert done.returncode == 2
        assert "name one device" in done.stderr

    def test_report_json_and_plots(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        target = tmp_path / "latency.json"
        sizes = ["--prompt-tokens", "8", "40", "100000", "--new-tokens", "6", "--repeat", "2", "--chat-turns", "2"]
        done = run("latency.py", demo_int4, "--device", device, *sizes, "--json", target, "--plot", tmp_path / "plots")
        assert done.returncode == 0, done.stderr
        assert "left out: 100000 prompt tokens" in done.stdout
        report = json.loads(target.read_text(encoding="utf-8"))
        assert "latency.py" in report["command"]
        assert [m["prompt_tokens"] for m in report["measurements"]] == [8, 40]
        assert all(len(m["samples"]) == 2 for m in report["measurements"])
        plots = sorted(path.name for path in (tmp_path / "plots").glob("*.png"))
        assert plots == ["chat.png", "inter-token.png", "latency.png"]

    def test_against_prints_what_is_published_for_the_model(self, tiny_fp32: Path, device: str, tmp_path: Path) -> None:
        target = tmp_path / "latency.json"
        sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1", "--chat-turns", "0"]
        done = run("latency.py", tiny_fp32, "--device", device, *sizes, "--against", "--json", target)
        assert done.returncode == 0, done.stderr
        assert "Published figures: none for this model (phi-3, f32, " in done.stdout
        assert json.loads(target.read_text(encoding="utf-8"))["published"]["rows"] == []

    def test_a_wrong_model_or_option_is_an_error_of_one_line(
        self, tmp_path: Path, device: str, demo_int4: Path
    ) -> None:
        done = run("latency.py", tmp_path / "none", "--device", device)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        done = run("latency.py", demo_int4, "--device", device, "--repeat", "0")
        assert done.returncode == 2
        assert "repeat=0" in done.stderr


class TestCompare:
    """`compare.py` and its modules."""

    def test_two_peers_are_compared(self, demo_int4: Path, device: str, tmp_path: Path, monkeypatch: Any) -> None:
        """The library and raw GenAI, each in its own process; both use this environment, to avoid installations."""
        peers, compare = module("_peers"), module("compare")
        python = Path(sys.executable)
        ours, raw, *others = peers.PEERS
        candidates = [
            _with_prepare(ours, lambda inputs: (python, inputs.exported)),
            _with_prepare(raw, lambda inputs: (python, inputs.exported)),
            *(_unavailable(peer) for peer in others),
        ]
        monkeypatch.setattr(compare, "PEERS", candidates)
        target, plot = tmp_path / "compare.json", tmp_path / "compare.png"
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
            ["compare.py", str(demo_int4), "--device", device, *sizes, "--json", str(target), "--plot", str(plot)],
        )
        assert compare.main() == 0
        report = json.loads(target.read_text(encoding="utf-8"))
        assert report["peers"] == ["ov_phi3", "openvino_genai"]
        assert report["not_measured"] == {peer.name: "no such package" for peer in others}
        assert report["replies_with_equal_ids"] == {"openvino_genai": {"equal": 8, "of": 8}}
        assert report["device"]["name"] == device
        ratio = report["figures"]["tpot_40"]["ov_phi3_over_peer"]["openvino_genai"]
        assert ratio["count"] == 4
        assert set(report["roofline"]["of_limit"]["openvino_genai"]) == {"8", "40"}
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_a_failed_request_is_reported_and_the_process_goes_on(self, tmp_path: Path) -> None:
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

    def test_ratios_are_medians_of_pairs(self) -> None:
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


def _with_prepare(peer: Any, prepare: Any) -> Any:
    from dataclasses import replace

    return replace(peer, prepare=prepare)


def _unavailable(peer: Any) -> Any:
    def prepare(_: Any) -> Any:
        raise module("_peers").BootstrapError("no such package")

    return _with_prepare(peer, prepare)


def test_levers_compares_settings_with_the_defaults(demo_int4: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "levers.json"
    arguments = ["--only", "none", "kv", "--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    done = run("levers.py", demo_int4, "--device", device, *arguments, "--json", target)
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text(encoding="utf-8"))
    settings = report["settings"]
    assert f" on {device} ({report['device']['full_name']})" in done.stdout
    assert [s["setting"] for s in settings][:2] == ["the defaults", "the defaults again (noise level)"]
    repeated = next(s for s in settings if s["group"] == "none" and s["tpot_over_default"])
    assert repeated["replies_with_equal_ids"] == 1
    assert all(1 < s["perplexity"] < 100 for s in settings if s["perplexity"] is not None)
    assert not any(s["failed"] for s in settings)


def test_perplexity_equals_that_of_transformers(demo_fp32: Path, demo_hf: Path) -> None:
    """The exported graph with chunked prefill gives the perplexity that transformers computes for the whole text."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    quality = module("_quality")
    ids = list(range(1000, 1100))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    perplexity = quality.score(demo_fp32, "CPU", ids, exact).perplexity
    model = AutoModelForCausalLM.from_pretrained(demo_hf, dtype=torch.float32)
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-3)


def test_a_text_longer_than_the_window_is_scored_whole(demo_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = module("_quality")
    ids = list(range(1000, 1080))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    whole = quality.score(demo_fp32, "CPU", ids, exact)
    monkeypatch.setattr(quality, "WINDOW", 33)
    parts = quality.score(demo_fp32, "CPU", ids, exact)
    assert parts.token_ids == whole.token_ids == ids[1:]
    assert len(parts.logprobs) == 79
    assert parts.logprobs[:32] == pytest.approx(whole.logprobs[:32], abs=1e-3)
    assert parts.logprobs[32] != pytest.approx(whole.logprobs[32], abs=1e-3)  # the context starts anew


@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_endurance_finds_no_fault(tiny_fp32: Path, device: str, tmp_path: Path, backend: str) -> None:
    target = tmp_path / "endurance.json"
    done = run(
        "endurance.py", tiny_fp32, "--device", device, "--requests", "300", "--backend", backend, "--json", target
    )
    report = json.loads(target.read_text(encoding="utf-8"))
    # Memory is not checked: with so few requests, kernels for new shapes are still being compiled.
    assert (report["faults"], report["same_answers"]) == ([], True), done.stdout
    assert report["left"]["python_threads"] == report["left"]["handles"] == 0
    groups = {
        group: sum(n for k, n in report["kinds"].items() if k.startswith(group)) for group in ("cancelled", "wrong")
    }
    assert groups == {"cancelled": 100, "wrong": 30}
    assert len(report["states"]) == 4


def test_concurrency_measures_every_number_of_callers(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "concurrency.json"
    sizes = ["--at-once", "3", "--repeat", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    done = run("concurrency.py", tiny_fp32, "--device", device, *sizes, "--genai", "--json", target)
    assert done.returncode == 0, done.stderr
    assert "1, without concurrency=" in done.stdout
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["samples"].keys() == {"plain", "1", "3", "1, GenAI's batching", "3, GenAI's batching"}
    assert f" on {device} ({report['device']['full_name']})" in done.stdout
    assert report["tokens_per_s_over_one_caller"]["1"] == 1.0
    samples = report["samples"]
    for number in ("1", "3"):
        [own], [genai] = samples[number], samples[f"{number}, GenAI's batching"]
        assert report["tokens_per_s_over_genai"][number] == own["tokens_per_s"] / genai["tokens_per_s"]
    assert "3 at once: " in done.stdout


def test_interference_has_gaps_of_replies_and_of_the_event_loop(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "interference.json"
    sizes = ["--prompt-tokens", "600", "--heartbeat-tokens", "100", "--repeat", "2"]
    done = run("interference.py", tiny_fp32, "--device", device, *sizes, "--json", target)
    assert done.returncode == 0, done.stderr
    assert "beside a prompt over alone: median" in done.stdout
    assert "4 prompts of 100" in done.stdout
    report = json.loads(target.read_text(encoding="utf-8"))
    samples, ratios = report["samples"], report["over_tpot_alone"]
    assert all(len(samples[name]) > 1 for name in ("alone", "beside a prompt", "heartbeat"))
    assert 0 < ratios["median"] <= ratios["p99"]


def test_start_has_the_parts_of_a_start_and_another_version(tiny_fp32: Path, device: str, tmp_path: Path) -> None:
    target = tmp_path / "start.json"
    sizes = ["--starts", "1", "--backend", "infer_request", "--against", ROOT / "src", "--cold"]
    done = run("start.py", tiny_fp32, "--device", device, *sizes, "--json", target)
    assert done.returncode == 0, done.stderr
    assert "start to first token" in done.stdout
    starts = json.loads(target.read_text(encoding="utf-8"))["starts"]
    assert starts.keys() == {"infer_request", "infer_request against"}
    for [parts] in starts.values():
        steps = [parts[name] for name in ("interpreter", "imports", "load", "first")]
        assert all(step > 0 for step in steps)
        assert abs(sum(steps) - parts["total"]) < 0.1
    wrong = run("start.py", tiny_fp32, "--device", device, "--against", tmp_path)
    assert wrong.returncode == 2
    assert "has no folder ov_phi3" in wrong.stderr
