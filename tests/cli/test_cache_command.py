"""`ov-phi3 cache`, and the flags of other commands that take its files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from ov_phi3.cli import main
from snapshots import edited, meta

SYSTEM = "You are a careful assistant of a small library, and you answer in one short sentence."
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def built(demo_int4: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "system.kv"
    assert main(["cache", "build", str(demo_int4), str(path), "--device", device, "--system", SYSTEM]) == 0
    return path


def test_info_describes_a_file(built: Path, capsys: Captured) -> None:
    assert main(["cache", "info", str(built)]) == 0
    text = capsys.readouterr().out
    for part in ("prefix", "cached tokens", "int4_sym", "openvino 20"):
        assert part in text
    assert main(["cache", "info", str(built), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "prefix"
    assert report["cached_tokens"] == report["token_ids"] > 10
    assert report["bytes"] == built.stat().st_size


def test_verify_checks_the_model_and_the_checksums(
    built: Path, demo_int4: Path, tiny_fp32: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["cache", "verify", str(built)]) == 0
    assert main(["cache", "verify", str(built), str(demo_int4)]) == 0
    assert "is intact and fits" in capsys.readouterr().out
    assert main(["cache", "verify", str(built), str(tiny_fp32)]) == 1
    assert "SnapshotError" in (err := capsys.readouterr().err)
    assert "is of another model" in err
    damaged = tmp_path / "damaged.kv"
    data = bytearray(built.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert main(["cache", "verify", str(damaged)]) == 1
    err = capsys.readouterr().err
    assert "damaged: past_key_values." in err
    assert len(err.splitlines()) == 1


def test_verify_names_the_adapters_of_a_file(built: Path, demo_int4: Path, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "adapted.kv"
    other.write_bytes(edited(built.read_bytes(), meta(adapters="0123 times 2")))
    assert main(["cache", "verify", str(other), str(demo_int4)]) == 0
    assert capsys.readouterr().out.endswith(f"fits {demo_int4} with the adapters 0123 times 2.\n")


def test_generate_continues_from_a_saved_prefix(built: Path, demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), "Where are the maps?", "--device", device, "--json", "--max-new-tokens", "8"]
    assert main([*command, "--prefix", str(built)]) == 0
    with_prefix = json.loads(capsys.readouterr().out)
    assert main([*command, "--system", SYSTEM, "--backend", "infer_request"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert with_prefix["metrics"]["prompt_tokens"] == without["metrics"]["prompt_tokens"]
    assert with_prefix["metrics"]["reused_tokens"] > 10
    assert without["metrics"]["reused_tokens"] == 0


def test_messages_and_raw_text_give_the_same_tokens(
    demo_int4: Path, device: str, tmp_path: Path, capsys: Captured
) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}]
    (tmp_path / "m.json").write_text(json.dumps(messages), encoding="utf-8")
    (tmp_path / "raw.txt").write_text(f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\nHi<|end|>\n", encoding="utf-8")
    built = []
    for flag, source in (("--messages", "m.json"), ("--raw", "raw.txt")):
        out = tmp_path / f"{source}.kv"
        command = [
            "cache",
            "build",
            str(demo_int4),
            str(out),
            "--device",
            device,
            flag,
            str(tmp_path / source),
            "--json",
        ]
        assert main(command) == 0
        built.append(json.loads(capsys.readouterr().out))
    assert built[0]["tokens"] == built[1]["tokens"]
    assert built[0]["exact"] is True


def test_build_reads_a_system_message_from_standard_input(
    built: Path, demo_int4: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SYSTEM))
    assert main(["cache", "build", str(demo_int4), str(tmp_path / "s.kv"), "--device", device, "--system", "-"]) == 0
    assert (tmp_path / "s.kv").read_bytes() == built.read_bytes()


def test_a_chat_is_saved_and_loaded(
    built: Path, demo_int4: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    saved = tmp_path / "a talk.kv"
    command = ["chat", str(demo_int4), "--device", device, "--max-new-tokens", "6"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"I am Ada.\n/save {saved}\n/save\n/save {tmp_path}/no/x\n"))
    assert main([*command, "--system", SYSTEM, "--prefix", str(built)]) == 0
    err = capsys.readouterr().err
    assert "from the cache)" in err  # the first turn reuses the prefix
    assert f"Saved to {saved}" in err
    assert "name the file: /save FILE" in err
    assert "SnapshotError" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Who am I?\n"))
    assert main([*command, "--load", str(saved)]) == 0
    err = capsys.readouterr().err
    assert "3 messages, " in err
    assert "from the cache)" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cache", "info", "nothing.kv"], 1, "does not exist"),
        (["cache", "build", "{model}", "x.kv", "--messages", "nothing.json"], 2, "cannot be read"),
        (["cache", "build", "{model}", "x.kv", "--messages", "{bad}"], 2, "expected a JSON list"),
        (["cache", "build", "{model}", "{missing}/x.kv", "--system", "Hi"], 1, "cannot be written"),
        (["cache", "build", "{model}", "x.kv", "--system", "Hi", "--backend", "llm_pipeline"], 2, "infer_request"),
        (["generate", "{model}", "x", "--prefix", "a.kv", "--system", "s"], 2, "contradict"),
        (["generate", "{model}", "x", "--prefix", "nothing.kv"], 1, "does not exist"),
        (["generate", "{model}", "x", "--logit-bias", "five"], 2, "expected ID=BIAS"),
        (["generate", "{model}", "x", "--backend", "llm_pipeline", "--top-logprobs", "1"], 2, "infer_request"),
        (["chat", "{model}", "--prefix", "{built}", "--system", "Something else."], 2, "does not match the beginning"),
        (["chat", "{model}", "--load", "{built}"], 1, "holds a prefix, not a chat"),
    ],
)
def test_a_failure_is_named_without_a_traceback(
    built: Path, demo_int4: Path, device: str, tmp_path: Path, capsys: Captured, arguments: Any, code: int, message: str
) -> None:
    (tmp_path / "bad.json").write_text('{"role": "system"}')
    values = {"model": demo_int4, "built": built, "bad": tmp_path / "bad.json", "missing": tmp_path / "no"}
    command = [argument.format(**values) for argument in arguments]
    if command[1] != "info":
        command += ["--device", device]
    assert main(command) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["cache"], ["cache", "build", "m", "o"], ["cache", "inf", "x"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_generate_takes_logit_bias_and_top_logprobs(demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), "Hi", "--device", device, "--json", "--max-new-tokens", "2", "--ignore-eos"]
    assert main([*command, "--logit-bias", "500=1000", "--top-logprobs", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["token_ids"] == [500, 500]
    assert report["logprobs"][0]["token_id"] == 500
    assert report["config"]["logit_bias"] == [[500, 1000.0]]
