"""The command line, called in this process and as a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ov_phi3.cli import build_parser, main

CAPITAL = "What is the capital of France?"
Captured = pytest.CaptureFixture[str]


def test_generate_streams_the_answer_and_its_latency(demo_int4: Path, device: str, capsys: Captured) -> None:
    assert main(["generate", str(demo_int4), CAPITAL, "--device", device]) == 0
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "first token" in err
    assert "ms per token" in err
    assert device in err


def test_generate_json(demo_int4: Path, device: str, capsys: Captured) -> None:
    assert main(["generate", str(demo_int4), CAPITAL, "--device", device, "--json", "--system", "Be brief."]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["finish_reason"] == "stop"
    assert report["metrics"]["ttft_ms"] > 0
    assert report["device_name"]


def test_generate_reads_standard_input_and_raw_prompts(demo_int4: Path, device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ov_phi3", "generate", str(demo_int4), "--raw", "--device", device, "-"],
        input=f"<|user|>\n{CAPITAL}<|end|>\n<|assistant|>\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_beam_search_prints_the_best_reply(demo_int4: Path, device: str, capsys: Captured) -> None:
    assert main(["generate", str(demo_int4), CAPITAL, "--device", device, "--num-beams", "2"]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["generate", "{model}", "x", "--temperature", "-1"], 2, "ConfigError: --temperature -1.0"),
        (["generate", "{model}", "x", "--device", "GPU.7"], 1, "DeviceError: --device 'GPU.7'"),
        (["generate", "{model}", "x", "--device", "TPU"], 2, "ConfigError: --device 'TPU'"),
        (["generate", "{empty}", "x"], 1, "ModelError"),
        (["generate", "{empty}/nothing", "x"], 1, "does not exist"),
        (["generate", "{model}", "x", "--ov-config", "NONSENSE"], 2, "KEY=VALUE"),
        (["generate", "{model}", "x", "--ov-config", "NUM_STREMS=1"], 2, "NUM_STREAMS"),
        (["generate", "{model}", "x", "--raw", "--system", "y"], 2, "contradict"),
        (["generate", "{model}", "bread " * 9000], 1, "ContextOverflowError"),
        (["export", "{empty}", "{empty}/out"], 1, "Error"),
        (["export", "{model}", "{empty}/out", "--group-sise", "64"], 2, "group_size"),
        (["export", "{model}", "{empty}/out", "--recipe", "int3"], 2, "int3"),
        (["bench", "{model}", "--repeat", "0"], 2, "repeat"),
    ],
)
def test_a_failure_is_one_line_on_stderr(
    demo_int4: Path, tmp_path: Path, capsys: Captured, argv: list[str], code: int, message: str
) -> None:
    assert main([a.format(model=demo_int4, empty=tmp_path) for a in argv]) == code
    out, err = capsys.readouterr()
    assert message in err
    lines = [line for line in err.splitlines() if "loaded in" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("ov-phi3: ")
    assert out == ""


@pytest.mark.parametrize(
    "argv", [[], ["generate"], ["generat"], ["generate", "m", "x", "--nonsense"], ["bench", "m", "--repeat", "x"]]
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "generate", "chat", "bench", "devices", "doctor"])
def test_every_command_has_help(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"ov-phi3 {command}" in capsys.readouterr().out


def test_every_option_has_a_flag_with_help() -> None:
    from ov_phi3 import GenerationConfig

    actions = build_parser()._subparsers._group_actions[0].choices["generate"]._actions  # type: ignore[union-attr]
    by_name = {a.dest: a for a in actions}
    for name in GenerationConfig.__dataclass_fields__.keys() - {"logits_processors"}:  # functions
        assert by_name[name].help, name


def test_devices_are_listed_as_text_and_json(capsys: Captured) -> None:
    assert main(["devices"]) == 0
    assert "CPU" in capsys.readouterr().out
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["full_name"]


def test_doctor_exits_with_1_if_a_check_fails(demo_int4: Path, tmp_path: Path, device: str, capsys: Captured) -> None:
    assert main(["doctor", str(demo_int4), "--device", device]) == 0
    assert "canary" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--device", device, "--json"]) == 1
    out, err = capsys.readouterr()
    assert any(c["status"] == "error" for c in json.loads(out))
    assert len(err.splitlines()) == 1


def test_bench_prints_a_report_or_json(demo_int4: Path, device: str, capsys: Captured) -> None:
    arguments = ["--prompt-tokens", "8", "16", "--new-tokens", "4", "--repeat", "2", "--device", device]
    assert main(["bench", str(demo_int4), *arguments]) == 0
    assert "TTFT" in capsys.readouterr().out
    assert main(["bench", str(demo_int4), *arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_in_generate_exits_with_130(demo_int4: Path, device: str) -> None:
    command = [sys.executable, "-m", "ov_phi3", "generate", str(demo_int4), CAPITAL, "--ignore-eos", "--device", device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped" in err


def test_a_closed_stdout_causes_no_traceback(demo_int4: Path, device: str) -> None:
    command = [sys.executable, "-m", "ov_phi3", "generate", str(demo_int4), CAPITAL, "--ignore-eos", "--device", device]
    process = subprocess.Popen([*command, "--max-new-tokens", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception" not in err
