"""The fingerprint of a saved KV cache: its parts, and which differences are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ov_phi3 import ChatTemplate, ModelInfo, Pipeline, SnapshotError
from ov_phi3.kv.fingerprint import KEYS_ALONE, check_fingerprint, fingerprint_of
from snapshots import edited, meta


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("recipe", "another export"),
        ("tokenizer", "another tokenizer"),
        ("template", "another chat template"),
        ("rope", "another RoPE configuration"),
        ("engine", "another OpenVINO release"),
    ],
)
def test_each_part_is_compared(tiny_loop: Pipeline, tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "p.kv"
    tiny_loop.prefill([5, 6, 7]).save(path)
    path.write_bytes(edited(path.read_bytes(), meta(**{key: "x"})))
    with pytest.raises(SnapshotError, match=message):
        tiny_loop.load_prefix(path)


def test_parts_that_can_be_read(tiny_fp32: Path, longrope: tuple[Path, Path, int]) -> None:
    template = ChatTemplate.phi3()
    plain, long = (fingerprint_of(ModelInfo.from_dir(path), template) for path in (tiny_fp32, longrope[0]))
    assert plain["rope"] == "plain, none"
    assert long["rope"].endswith(f"factors change at {longrope[2]} tokens")
    assert plain["engine"].startswith("openvino 20")
    assert plain["template"].startswith("phi3 ")
    assert re.fullmatch("[0-9a-f]{32}", plain["tokenizer"])
    assert plain["model"] != long["model"]


def test_another_release_can_be_accepted() -> None:
    expected = dict.fromkeys(("model", "recipe", "tokenizer", "template", "rope", "engine"), "x")
    other = {**expected, "engine": "openvino 2030.1"}
    check_fingerprint(other, expected, "a.kv", but=KEYS_ALONE)
    with pytest.raises(SnapshotError, match=r"a\.kv is of another OpenVINO release: engine is 'openvino 2030.1' in"):
        check_fingerprint(other, expected, "a.kv")
    with pytest.raises(SnapshotError, match="model is 'missing'"):
        check_fingerprint({}, expected, "a.kv", but=KEYS_ALONE)
