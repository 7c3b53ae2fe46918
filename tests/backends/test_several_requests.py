"""`load(concurrency=)`: several requests at once, each with the same reply as without the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline, TokenStream
from ov_phi3.backends.paged.pace import Pace

GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
PROMPTS = [[300 + 7 * number, 400, 500 + number] + [600 + number] * (40 * number) for number in range(6)]


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of some work, each run in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(lambda work: work(), works))


class Company:
    """Long replies that run at the same time."""

    def __init__(self, pipe: Pipeline, count: int = 2) -> None:
        self.streams = [pipe.stream(PROMPTS[number], max_new_tokens=1500, **GREEDY) for number in range(count)]

    def __enter__(self) -> list[TokenStream]:
        self.readers = [iter(stream) for stream in self.streams]  # dropping a reader cancels its reply
        for reader in self.readers:
            next(reader)
        return self.streams

    def __exit__(self, *_: object) -> None:
        for stream in self.streams:
            stream.cancel()
        assert [stream.result.finish_reason for stream in self.streams] == ["cancelled"] * len(self.streams)


def test_a_short_reply_overtakes_a_long_one(tiny_pipe: Pipeline, tiny_batch: Pipeline) -> None:
    alone = [tiny_pipe.generate(prompt, max_new_tokens=9, **GREEDY).token_ids for prompt in PROMPTS]
    with Company(tiny_batch, 3) as long:
        assert [tiny_batch.generate(prompt, max_new_tokens=9, **GREEDY).token_ids for prompt in PROMPTS] == alone
        assert not any(stream.done for stream in long)
    whole = tiny_pipe.generate(PROMPTS[0], max_new_tokens=len(long[0].result.token_ids), **GREEDY)
    assert long[0].result.token_ids == whole.token_ids
    assert long[0].result.metrics.reused_tokens is not None
    assert tiny_batch.load_report.backend == "infer_request"


def test_conversations(tiny_pipe: Pipeline, tiny_batch: Pipeline) -> None:
    def talk(pipe: Pipeline, subject: str) -> list[list[int]]:
        chat = pipe.chat(system="Be brief.")
        return [chat.send(f"{subject} {n}", max_new_tokens=20, **GREEDY).token_ids for n in range(4)]

    subjects = ["bread", "water", "stone", "light", "paper", "glass"]
    alone = [talk(tiny_pipe, subject) for subject in subjects]
    assert at_once([lambda s=subject: talk(tiny_batch, s) for subject in subjects]) == alone


def test_a_cache_too_small_for_all_of_them(tiny_pipe: Pipeline, tiny_fp32: Path, device: str) -> None:
    # One of them is preempted then, and computed again later.
    size = 24 * 32 * ov_phi3.ModelInfo.from_dir(tiny_fp32).kv_bytes_per_token_for(32) / 2**30
    prompts = [[300 + number] * 200 for number in range(6)]
    alone = [tiny_pipe.generate(prompt, max_new_tokens=150, **GREEDY).token_ids for prompt in prompts]
    with ov_phi3.load(tiny_fp32, device=device, concurrency=4, kv_cache_gb=size) as pipe:
        assert pipe.load_report.kv_cache_tokens == 24 * 32
        works = [lambda p=prompt: pipe.generate(p, max_new_tokens=150, **GREEDY).token_ids for prompt in prompts]
        assert at_once(works) == alone


def test_a_seeded_request_is_reproducible_beside_others(tiny_batch: Pipeline) -> None:
    def seeded() -> list[int]:
        return tiny_batch.generate(PROMPTS[1], max_new_tokens=20, do_sample=True, seed=5).token_ids

    expected = seeded()
    others = [
        lambda n=n: tiny_batch.generate(PROMPTS[n], max_new_tokens=20, do_sample=True, temperature=2.0)
        for n in range(4)
    ]
    found = at_once([*others, seeded, *others, seeded])
    assert [found[4], found[9]] == [expected, expected]


def test_several_replies_and_structure_beside_others(tiny_batch: Pipeline) -> None:
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    alone = tiny_batch.generate(PROMPTS[2], **beams)
    with Company(tiny_batch):
        beside = tiny_batch.generate(PROMPTS[2], **beams)
        digits = tiny_batch.generate(PROMPTS[0], regex="[0-9]{3}!", max_new_tokens=20, do_sample=False).text
    assert [a.token_ids for a in beside.alternatives] == [a.token_ids for a in alone.alternatives]
    assert beside.alternatives[0].score >= beside.alternatives[1].score
    assert digits[:3].isdigit()
    assert digits[3:] == "!"


def test_ends_of_one_leave_the_others(tiny_pipe: Pipeline, tiny_batch: Pipeline) -> None:
    def refuse(done: int, total: int) -> None:
        raise ZeroDivisionError(f"{done} of {total}")

    alone = tiny_pipe.generate(PROMPTS[3], max_new_tokens=40, **GREEDY).token_ids
    with Company(tiny_batch):
        kept = tiny_batch.stream(PROMPTS[3], max_new_tokens=40, **GREEDY)
        with pytest.raises(ZeroDivisionError):
            tiny_batch.generate(PROMPTS[4], on_prefill=refuse, **GREEDY)
        assert tiny_batch.generate(PROMPTS[5], timeout=1e-9, **GREEDY).finish_reason == "timeout"
        with tiny_batch.stream(PROMPTS[5], **GREEDY) as left:
            next(iter(left))
        assert left.result.finish_reason == "cancelled"
        with pytest.raises(ov_phi3.PromptError):
            tiny_batch.generate([10**6], **GREEDY)
        assert kept.result.token_ids == alone
    assert tiny_batch.generate(PROMPTS[3], max_new_tokens=40, **GREEDY).token_ids == alone


def test_a_stop_string(tiny_pipe: Pipeline, tiny_batch: Pipeline) -> None:
    text = tiny_pipe.generate(PROMPTS[0], max_new_tokens=20, **GREEDY).text
    stop = text[len(text) // 2 :][:3]
    expected = tiny_pipe.generate(PROMPTS[0], max_new_tokens=20, stop=[stop], **GREEDY)
    with Company(tiny_batch):
        found = tiny_batch.generate(PROMPTS[0], max_new_tokens=20, stop=[stop], **GREEDY)
    assert (found.text, found.token_ids, found.finish_reason) == (expected.text, expected.token_ids, "stop")


def test_close_ends_them_all(tiny_fp32: Path, device: str) -> None:
    before = set(threading.enumerate())
    pipe = ov_phi3.load(tiny_fp32, device=device, concurrency=3)
    streams = [pipe.stream(prompt, max_new_tokens=1500, **GREEDY) for prompt in PROMPTS]
    reader = iter(streams[0])
    next(reader)
    pipe.close()
    assert {stream.result.finish_reason for stream in streams} == {"cancelled"}
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "expected 1 to 256"),
        ({"concurrency": 257}, "expected 1 to 256"),
        ({"concurrency": 2, "ov_config": {"ATTENTION_BACKEND": "SDPA"}}, "belongs to backend='llm_pipeline'"),
        (
            {"concurrency": 4, "backend": "llm_pipeline"},
            r"^concurrency=4 does not work with backend='llm_pipeline', which runs one request after another; expected "
            r"concurrency=1\. Leave out the backend, or take backend='infer_request', which runs several at once\.$",
        ),
    ],
)
def test_refused(tiny_fp32: Path, device: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ov_phi3.load(tiny_fp32, device=device, **options)


def test_needs_a_number(tiny_fp32: Path) -> None:
    with pytest.raises(TypeError, match="concurrency must be a whole number"):
        ov_phi3.load(tiny_fp32, concurrency=True)


def test_only_a_streamed_reply_limits_the_time_of_a_step(tiny_batch: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, bool]] = []
    real = Pace.prefill_budget

    def prefill_budget(pace: Pace, decoding: int, prefilling: int, streamed: bool) -> int:
        asked.append((decoding, prefilling, streamed))
        return real(pace, decoding, prefilling, streamed)

    monkeypatch.setattr(Pace, "prefill_budget", prefill_budget)
    at_once([lambda p=p: tiny_batch.generate(p, max_new_tokens=20, **GREEDY) for p in PROMPTS[:3]])
    assert {streamed for decoding, _, streamed in asked if decoding} == {False}
    asked.clear()
    with Company(tiny_batch, 1):
        tiny_batch.generate(PROMPTS[4], max_new_tokens=5, **GREEDY)
    assert {streamed for decoding, _, streamed in asked if decoding} == {True}
