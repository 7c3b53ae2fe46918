"""`ov-phi3 generate`: where its prompt comes from, and that every option is obeyed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ov_phi3.cli import main

CAPITAL = "What is the capital of France?"
Captured = pytest.CaptureFixture[str]


def prompt_of(tmp_path: Path, arguments: list[str], stdin: bytes | None = None) -> Any:
    """The prompt of a command line, in a process of its own with this standard input (None: /dev/null)."""
    code = (
        "import sys, json\n"
        "from ov_phi3.cli import build_parser\n"
        "from ov_phi3.cli.generate import _prompt\n"
        "from ov_phi3.errors import Error\n"
        "try:\n"
        "    print(json.dumps(_prompt(build_parser().parse_args(['generate', 'm', *sys.argv[1:]]))))\n"
        "except Error as exc:\n"
        "    print(json.dumps(f'{type(exc).__name__}: {exc}'))\n"
    )
    source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, cwd=tmp_path, **source)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["Hi"], None, "Hi"),
        ([], b"Hi\n", "Hi"),
        (["-"], b"Hi\n", "Hi"),
        (["--seed", "1", "Hi"], None, "Hi"),
        (["--seed", "1", "-"], b"Hi", "Hi"),
        (["Sum up:"], b"A text.\n", "Sum up:\n\nA text."),
        (["Compare:", "--file", "a.txt", "-f", "b.txt"], None, "Compare:\n\nfirst\n\nsecond"),
        (["-f", "a.txt", "-f", "-"], b"third", "first\n\nthird"),
        (["Hi", "--system-file", "a.txt"], None, [["system", "first"], ["user", "Hi"]]),
        (["Hi", "--system-file", "-"], b"Be brief.\n", [["system", "Be brief."], ["user", "Hi"]]),
        (["Hi", "--system", "Be brief."], None, [["system", "Be brief."], ["user", "Hi"]]),
    ],
)
def test_a_prompt_comes_from_arguments_files_and_standard_input(
    tmp_path: Path, arguments: list[str], stdin: bytes | None, prompt: Any
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n")
    (tmp_path / "b.txt").write_text("second\n")
    got = prompt_of(tmp_path, arguments, stdin)
    assert ([[m["role"], m["content"]] for m in got] if isinstance(got, list) else got) == prompt


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfHi\r\nthere\r\n", "Hi\nthere"),
        ("Grüße\n".encode("utf-16"), "Grüße"),
        (b"\xfe\xff" + "Grüße".encode("utf-16-be"), "Grüße"),
        ("Grüße".encode("utf-32"), "Grüße"),
        (b"two\n\n", "two\n"),
        (b"a lone \r stays", "a lone \r stays"),
    ],
)
def test_what_an_editor_adds_is_no_part_of_a_prompt(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert prompt_of(tmp_path, [], data) == text
    assert prompt_of(tmp_path, ["-f", "x.txt"]) == text


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], None, "the prompt is empty"),
        ([""], None, "the prompt is empty"),
        ([" \n"], None, "the prompt is empty"),
        (["-"], b"\n", "the prompt is empty"),
        (["-f", "nothing.txt"], None, "nothing.txt cannot be read: No such file"),
        (["-f", "."], None, "cannot be read"),
        (["-f", "latin.txt"], None, "latin.txt is not valid UTF-8 at byte 3"),
        ([], b"caf\xe9", "standard input is not valid UTF-8 at byte 4"),
        (["-", "-f", "-"], b"x", "standard input is asked for twice"),
        (["--system-file", "-"], b"x", "there is no prompt"),
        (["x", "--system", "a", "--system-file", "b"], None, "--system and --system-file contradict"),
        (["x", "--raw", "--system-file", "b"], None, "--raw and --system-file contradict"),
        ([b"caf\xe9".decode("utf-8", "surrogateescape")], None, "PROMPT is not valid UTF-8 at character 4"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(
    tmp_path: Path, arguments: list[str], stdin: bytes | None, message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    got = prompt_of(tmp_path, arguments, stdin)
    assert got.startswith("ConfigError: ")
    assert message in got


def test_a_raw_prompt_keeps_its_last_newline(tmp_path: Path) -> None:
    text = b"<|user|>\r\nHi<|end|>\r\n<|assistant|>\r\n"
    assert prompt_of(tmp_path, ["--raw"], text) == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_an_instruction_and_a_pipe_reach_the_model(demo_int4: Path, device: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ov_phi3", "generate", str(demo_int4), "--device", device, "--quiet"]
    done = subprocess.run(command, input=f"{CAPITAL}\r\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_every_reply_is_printed(demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), CAPITAL, "--device", device, "--max-new-tokens", "8"]
    assert main([*command, "--num-return-sequences", "3", "--temperature", "1", "--seed", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines if line.startswith("---")] == [f"--- reply {n} of 3" for n in (1, 2, 3)]
    assert main([*command, "--num-beams", "2"]) == 0
    assert "---" not in capsys.readouterr().out


def test_log_probabilities_are_printed(demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), CAPITAL, "--device", device, "--max-new-tokens", "4", "--top-logprobs", "2"]
    assert main(command) == 0
    reply, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = rest.splitlines()
    assert rows[0].split() == ["token", "logprob", "probability", "most", "likely"]
    assert len(rows) == 5
    assert all(row.count("%") == 3 for row in rows[1:])
    assert "".join(json.loads(row.split("  ")[0]) for row in rows[1:]).strip() == reply


def test_a_seed_without_sampling_is_said_to_be_unused(demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), CAPITAL, "--device", device, "--max-new-tokens", "2", "--seed", "3"]
    assert main(command) == 0
    assert "--seed 3 has no effect" in capsys.readouterr().err
    assert main([*command, "--temperature", "0.5"]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_a_reply_ends_by_its_time_limit(demo_int4: Path, device: str, capsys: Captured) -> None:
    command = ["generate", str(demo_int4), CAPITAL, "--device", device, "--ignore-eos", "--timeout", "0.3"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "timeout"


def test_a_schema_comes_from_a_file(demo_int4: Path, device: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "s.json").write_bytes(b'\xef\xbb\xbf{"enum": ["Paris", "Rome"]}\r\n')
    command = ["generate", str(demo_int4), CAPITAL, "--device", device, "--json-schema"]
    assert main([*command, f"@{tmp_path}/s.json"]) == 0
    assert json.loads(capsys.readouterr().out) in ("Paris", "Rome")
    assert main([*command, f"@{tmp_path}/none.json"]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    (tmp_path / "g.txt").write_text('root ::= "yes" | "no"\n')
    assert main([*command[:-1], "--grammar", f"@{tmp_path}/g.txt"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
