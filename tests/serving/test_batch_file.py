"""Files of prompts: both formats, errors as lines, and runs that go on after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3.cli import main
from ov_phi3.serving.batch_file import run_batch

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
# Few candidates: a draw among thousands of unlikely tokens would depend on the last bit of their probabilities, which
# differs between passes over few and over many rows.
CONFIG = ov_phi3.GenerationConfig(max_new_tokens=6, ignore_eos=True, seed=5, temperature=1.5, top_k=20)


def chat_line(name: str, **body: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"Tell me about {name}."}
    body = {"model": "phi-3", "messages": [message], **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
ROWS: list[Any] = [
    "What is the capital of France?",
    {"id": "a", "prompt": "Hi", "max_new_tokens": 3},
    chat_line("c1"),
    [{"role": "user", "content": "Hello"}],
    chat_line("c2", max_tokens=2, temperature=0),
    {"messages": [{"role": "user", "content": "Hi"}], "temprature": 1},
    chat_line("c3", nosuch=1),
    {**chat_line("c4"), "url": "/v1/embeddings"},
    {"prompt": [5, 6, 7], "seed": 9},
    *[f"Number {n}" for n in range(8)],
    chat_line("c5", tools=[ADD], tool_choice="required", max_tokens=400),
    {"prompt": "Hi", "tools": [ADD], "tool_choice": "required", "max_new_tokens": 400},
]


@pytest.fixture(scope="module")
def pipe3(demo_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(demo_fp32, device=device, concurrency=3, ov_config=EXACT) as pipe:
        yield pipe


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(pipe3: ov_phi3.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    summary = run_batch(pipe3, folder / "in.jsonl", folder / "out.jsonl", CONFIG)
    assert (summary.total, summary.kept, summary.errors) == (len(ROWS), 0, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return (folder / "out.jsonl").read_bytes()


def test_each_row_has_its_line_in_order(undisturbed: bytes, pipe3: ov_phi3.Pipeline) -> None:
    lines = [json.loads(line) for line in undisturbed.splitlines()]
    assert [line.get("custom_id", line.get("index")) for line in lines] == [
        0, 1, "c1", 3, "c2", 5, "c3", "c4", 8, *range(9, 17), "c5", 18,
    ]  # fmt: skip
    assert (lines[1]["id"], lines[1]["generated_tokens"], lines[1]["finish_reason"]) == ("a", 3, "length")
    assert lines[5]["error"]["type"] == "ConfigError"
    assert "temprature" in lines[5]["error"]["message"]
    body = lines[2]["response"]["body"]
    assert (lines[2]["response"]["status_code"], body["object"], body["usage"]["completion_tokens"]) == (
        200, "chat.completion", 6,
    )  # fmt: skip
    for line, word in ((lines[6], "nosuch"), (lines[7], "/v1/embeddings")):
        assert line["response"]["status_code"] == 400
        assert word in line["response"]["body"]["error"]["message"]
    for calls in (lines[17]["response"]["body"]["choices"][0]["message"]["tool_calls"], lines[18]["tool_calls"]):
        assert {call["function"]["name"] for call in calls} == {"add"}
        assert len({call["id"] for call in calls}) == len(calls)
    greedy = pipe3.generate("Tell me about c2.", max_new_tokens=2, ignore_eos=True, temperature=0)
    assert lines[4]["response"]["body"]["choices"][0]["message"]["content"] == greedy.text
    alone = pipe3.generate("Number 3", CONFIG.replace(seed=ov_phi3.many.row_seed(5, 12)))
    assert lines[12]["text"] == alone.text


@pytest.mark.parametrize("seed", range(4))
def test_a_torn_file_is_completed(pipe3: ov_phi3.Pipeline, prompts: Path, undisturbed: bytes, seed: int) -> None:
    """Any lines, in any order, and the beginning of another one: as a kill leaves them."""
    rng = random.Random(seed)
    out = prompts.with_name("out.jsonl")
    lines = undisturbed.splitlines(keepends=True)
    rng.shuffle(lines)
    kept = rng.randrange(len(lines))
    torn = lines[kept][: rng.randrange(len(lines[kept]))]
    out.write_bytes(b"".join(lines[:kept]) + torn)
    assert run_batch(pipe3, prompts, out, CONFIG).kept == kept
    assert out.read_bytes() == undisturbed
    assert run_batch(pipe3, prompts, out, CONFIG).generated_tokens == 0
    assert out.read_bytes() == undisturbed


def test_lines_of_other_prompts_or_options_are_refused_and_stay(
    pipe3: ov_phi3.Pipeline, prompts: Path, undisturbed: bytes
) -> None:
    out = prompts.with_name("out.jsonl")
    out.write_bytes(undisturbed)
    with pytest.raises(ov_phi3.ConfigError, match="other options or other properties"):
        run_batch(pipe3, prompts, out, CONFIG.replace(seed=6))
    prompts.write_text('"another"\n')
    with pytest.raises(ov_phi3.ConfigError, match="other options or other properties"):
        run_batch(pipe3, prompts, out, CONFIG)
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("text", "match"),
    [('"a"\n{"prompt"\n', "line 2"), (2 * (json.dumps(chat_line("same")) + "\n"), "custom_id same occurs twice")],
)
def test_a_file_that_is_no_batch_is_refused(pipe3: ov_phi3.Pipeline, tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ov_phi3.ConfigError, match=match):
        run_batch(pipe3, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_replies_of_other_conditions_are_refused(
    pipe3: ov_phi3.Pipeline, prompts: Path, undisturbed: bytes, device: str
) -> None:
    out = prompts.with_name("out.jsonl")
    out.write_bytes(undisturbed)
    with pytest.raises(ov_phi3.ConfigError, match="other properties"):
        run_batch(pipe3, prompts, out, CONFIG, model_name="another")
    for how in ({"ov_config": {**EXACT, "KV_CACHE_PRECISION": "u8"}}, {"ov_config": EXACT, "context_length": 500}):
        options: dict[str, Any] = {"device": device, "concurrency": 3, **how}
        with ov_phi3.load(pipe3.info.path, **options) as other, pytest.raises(ov_phi3.ConfigError, match="properties"):
            run_batch(other, prompts, out, CONFIG)
    with ov_phi3.load(pipe3.info.path, device=device, concurrency=5, ov_config=EXACT) as other:
        assert run_batch(other, prompts, out, CONFIG).kept == len(ROWS)
    assert out.read_bytes() == undisturbed


def test_the_command_runs_one_row_after_another_on_llm_pipeline(
    tiny_fp32: Path, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(f"Say {n}") + "\n" for n in range(3)))
    files = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    flags = ["--device", device, "--backend", "llm_pipeline", "--max-new-tokens", "3"]
    assert main(["batch", str(tiny_fp32), *files, *flags, "--concurrency", "4"]) == 2
    error = capsys.readouterr().err
    assert "--concurrency 4 does not work with --backend llm_pipeline" in error
    assert "or take --backend infer_request" in error
    assert main(["batch", str(tiny_fp32), *files, *flags]) == 0
    assert "3 replies in " in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 3


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_command_killed_ten_times_goes_on(demo_fp32: Path, device: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(f"Say {n}") + "\n" for n in range(40)))
    rng = random.Random(1)

    def start(out: Path) -> subprocess.Popen[bytes]:
        options = [
            "--max-new-tokens",
            "6",
            "--ignore-eos",
            "--temperature",
            "1",
            "--top-k",
            "20",
            "--seed",
            "4",
            "--concurrency",
            "4",
        ]
        files = [str(demo_fp32), str(tmp_path / "in.jsonl"), str(out)]
        command = [sys.executable, "-m", "ov_phi3", "batch", *files, "--device", device, *options]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    with start(whole) as process:
        assert process.stderr is not None
        assert b" 0 errors" in process.stderr.read()
    for at in sorted(rng.sample(range(39), 10)):
        with start(torn) as process:
            while process.poll() is None and (not torn.exists() or torn.read_bytes().count(b"\n") < at):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))  # where in a step the kill comes is left to chance
            process.send_signal(signal.SIGKILL)
        assert torn.read_bytes().count(b"\n") >= at
    with start(torn) as process:
        assert process.stderr is not None
        assert b" kept, " in process.stderr.read()
    assert torn.read_bytes() == whole.read_bytes()
