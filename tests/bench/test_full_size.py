"""`compare.py --full-size`: refusals, peers that run one after another, and the tables."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import DeviceInfo, Machine
from ov_phi3.system.memory import Memory

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GIB = 2**30


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layers", "4"], "--layers 4 is for --full-size"),
        (["--full-size", "--layers", "0"], "--layers 0: expected 1 to 999"),
        (["--full-size", "MODEL"], "makes its own model: leave out MODEL"),
        (["--full-size", "--only", "llama.cpp"], "--only llama.cpp: expected one of ov_phi3, ov_phi3-infer_request"),
        (["--full-size", "--layers", "999"], "--full-size with 999 layers needs 295.5 GiB of memory"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OV_PHI3_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


class TestResources:
    """The check of memory and disk space."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path))
        return tmp_path

    def test_an_export_needs_more_memory_than_a_run(self, cache: Path) -> None:
        full_size = module("_full_size")
        with pytest.raises(Exception, match=r"needs 10\.0 GiB of memory and 8\.0 GiB are free"):
            full_size.check_resources(32, set(), free_memory=8 * GIB)
        (cache / "models" / "key" / "mini32-int4").mkdir(parents=True)
        full_size.check_resources(32, set(), free_memory=8 * GIB)
        with pytest.raises(Exception, match=r"needs 6\.4 GiB"):
            full_size.check_resources(32, set(), free_memory=6 * GIB)

    def test_disk_space_is_for_the_absent_files_only(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full_size = module("_full_size")
        usage = types.SimpleNamespace(free=9 * GIB)
        monkeypatch.setattr(full_size.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(Exception, match=r"needs \d+\.\d GiB of disk space for hf, int4 and .* has 9\.0 GiB"):
            full_size.check_resources(32, set(), free_memory=30 * GIB)
        (cache / "models" / "key" / "mini32-hf").mkdir(parents=True)
        full_size.check_resources(32, set(), free_memory=30 * GIB)
        with pytest.raises(Exception, match="for int4, q4_0 and"):
            full_size.check_resources(32, {"llama.cpp-Q4_0"}, free_memory=30 * GIB)

    def test_a_builder_that_does_not_fit_names_the_layers_that_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full_size, peers = module("_full_size"), module("_peers")
        monkeypatch.setattr(full_size, "machine_memory", lambda: Memory(24 * GIB, 8 * GIB))
        peer = full_size.full_size_peers(32)[-1]
        assert peer.name == "onnxruntime-genai"
        with pytest.raises(module("_environment").BootstrapError, match=r"--layers \d+ fits"):
            peer.prepare(peers.Inputs(tmp_path, tmp_path / "key" / "mini32-hf", None))


def test_peers_that_do_not_fit_together_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = module("compare")
    model = tmp_path / "model"
    model.mkdir()
    with (model / "openvino_model.bin").open("wb") as file:
        file.truncate(GIB)
    peers = {name: (None, Path("python"), model) for name in "abcd"}
    run = compare.Run(tuple(peers))
    run.dropped["d"] = "failed"

    def groups(available: float) -> list[list[str]]:
        monkeypatch.setattr(compare, "machine_memory", lambda: Memory(24 * GIB, int(available * GIB)))
        return [sorted(group) for group in compare._fitting(peers, run, random.Random(1))]

    assert sorted(name for group in groups(1) for name in group) == ["a", "b", "c"]
    assert [len(group) for group in groups(1)] == [1, 1, 1]
    assert [len(group) for group in groups(2 * 2.9 / 0.7 + 0.1)] == [2, 1]
    assert groups(100) == [["a", "b", "c"]]


def test_a_run_pairs_values_of_peers_that_were_not_alive_together(
    tiny_fp32: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both backends of the library, one at a time, with the whole command and its files."""
    compare, full_size = module("compare"), module("_full_size")
    python = Path(sys.executable)
    peers = [
        replace(peer, prepare=lambda _: (python, tiny_fp32))
        for peer in full_size.full_size_peers(2)
        if peer.name in ("ov_phi3", "ov_phi3-infer_request")
    ]
    monkeypatch.setattr(compare, "full_size_peers", lambda _: peers)
    monkeypatch.setattr(compare, "full_size_inputs", lambda _: module("_peers").Inputs(tiny_fp32, None, None))
    monkeypatch.setattr(compare, "check_resources", lambda *_: None)
    monkeypatch.setattr(compare, "machine_memory", lambda: Memory(GIB, GIB // 1000))
    json_file, markdown = tmp_path / "full.json", tmp_path / "full.md"
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2", "--repeat", "1"]
    files = ["--json", str(json_file), "--markdown", str(markdown)]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--full-size", "--layers", "2", "--device", device, *sizes, *files])
    assert compare.main() == 0
    report = json.loads(json_file.read_text(encoding="utf-8"))
    assert report["peers"] == ["ov_phi3", "ov_phi3-infer_request"]
    assert report["replies_with_equal_ids"]["ov_phi3-infer_request"] == {"equal": 2, "of": 2}
    tpot = report["figures"]["tpot_8"]
    assert all(len([v for v in samples if v]) == 2 for samples in tpot["samples"].values())
    assert tpot["ov_phi3_over_peer"]["ov_phi3-infer_request"]["count"] == 2
    assert len(report["roofline"]["bandwidths"]) == 4  # two rounds of two groups
    assert "| ov_phi3-infer_request | 8 |" in markdown.read_text(encoding="utf-8")
    assert list(tmp_path.glob("*.png")) == []


@pytest.fixture
def comparison(device: str) -> Any:
    """Made by hand: llama.cpp takes 0.8 of our time per token, and reads half as many bytes."""
    values, peers = module("_comparison"), module("_full_size").full_size_peers(4)
    run = values.Run(tuple(peer.name for peer in peers))
    run.dropped = {peer.name: "left out" for peer in peers if peer.name not in ("ov_phi3", "llama.cpp-Q4_0")}
    for at in ((1, 1), (1, 2)):
        run.add("tpot_32", {"ov_phi3": 100.0}, at)
        run.add("tpot_32", {"llama.cpp-Q4_0": 80.0}, at)
    run.bandwidths = [30e9, 20e9, 25e9]
    run.traffic = {"ov_phi3": (2_000_000_000, 0.0), "llama.cpp-Q4_0": (999_960_000, 1_000.0)}
    info = types.SimpleNamespace(path=Path("mini4-int4"), quantization="int4", weight_bytes=1)
    return values.Comparison.of(
        run,
        peers,
        {"new_tokens": 16, "threads": 2, "layers": 4},
        Machine.here(),
        DeviceInfo("CPU", "a CPU", "CPU", discrete=False),
        info,
    )


def test_a_ratio_at_equal_bytes_is_one_of_times_per_byte(comparison: Any) -> None:
    (figure,) = comparison.tpot_figures
    assert comparison.bytes_per_token("llama.cpp-Q4_0", figure) == pytest.approx(1e9)  # 40 tokens precede it on average
    assert figure.ratio("llama.cpp-Q4_0").p50 == pytest.approx(1.25)
    assert comparison.at_equal_bytes(figure, "ov_phi3", "llama.cpp-Q4_0").p50 == pytest.approx(0.625)
    assert comparison.roofline_fractions("ov_phi3")[32] == pytest.approx(0.8)  # 80 ms at the median of 25 GB/s


@pytest.mark.parametrize("markdown", [False, True])
def test_the_tables_have_bytes_and_roofline_beside_each_peer(comparison: Any, markdown: bool) -> None:
    texts = module("_comparison_text")
    text = (texts.comparison_markdown if markdown else texts.comparison_text)(comparison)
    rows = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()]
    assert "ov_phi3 32 2000 20.0 (20.0 to 20.0) 80%" in rows
    assert "llama.cpp-Q4_0 32 1000 12.5 (12.5 to 12.5) 50%" in rows
    assert "32 tokens, ov_phi3 0.625 (0.625 to 0.625)" in rows
    assert "TPOT after 32 tokens 1.250 (1.250 to 1.250)" in rows
    assert "the memory bandwidth is 25.0 GB/s (20.0 to 30.0 in 3 measurements)" in text
    assert any(row.startswith("onnxruntime-genai: not measured: left out") for row in rows)
    assert ("| --- | --- |" in text) is markdown


def test_the_exported_model_is_what_this_library_loads(comparison: Any) -> None:
    assert comparison.ours == ("ov_phi3",)
    assert isinstance(comparison.rooflines["ov_phi3"], ov_phi3.Roofline)
