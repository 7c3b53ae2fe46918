"""`generate_many`: order, errors as values, seeds, grouping, progress, and ending early."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from scripted import MakePipe

import ov_phi3
from ov_phi3.many import row_seed

PROMPTS = ["What is the capital of France?", "Who are you?", "Count to five.", "Tell me a story.", "Hi"]


def texts(outcomes: list[Any]) -> list[str]:
    return [outcome.text for outcome in outcomes]


@pytest.fixture(scope="module")
def many(demo_fp32: Any, device: str) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(demo_fp32, device=device, concurrency=4) as pipe:
        yield pipe


def test_results_are_those_of_one_call_each_in_order(many: ov_phi3.Pipeline) -> None:
    alone = [many.generate(prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]
    batch = many.generate_many(PROMPTS, max_new_tokens=12)
    assert [outcome.token_ids for outcome in batch.results()] == alone
    assert batch.results() == []
    assert {i: o.token_ids for i, o in many.generate_many(iter(PROMPTS), max_new_tokens=12)} == dict(enumerate(alone))


def test_rows_have_their_own_options(many: ov_phi3.Pipeline) -> None:
    message = [{"role": "user", "content": PROMPTS[0]}]
    rows: list[Any] = [
        (PROMPTS[0], {"max_new_tokens": 2}),
        {"prompt": PROMPTS[0], "max_new_tokens": 3},
        {"messages": message, "stop": "Paris", "timeout": 60},
        many.encode(PROMPTS[0]),
        message,
    ]
    outcomes = many.generate_many(rows, max_new_tokens=8, ignore_eos=True).results()
    assert [len(outcome.token_ids) for outcome in outcomes][:2] == [2, 3]
    assert outcomes[2].stop_string == "Paris"
    assert outcomes[3].token_ids == outcomes[4].token_ids
    assert len(outcomes[4].token_ids) == 8


def test_errors_are_values_and_the_others_go_on(many: ov_phi3.Pipeline) -> None:
    def fails(ids: Any, logits: Any) -> Any:
        raise ZeroDivisionError("mine")

    rows: list[Any] = [
        "Hi", 5, ("Hi", {"temprature": 1}), {"role": "user", "content": "Hi"}, ("Hi", {"max_new_tokens": 10**6}),
        {"prompt": "a", "messages": []}, ("Hi", {"logits_processors": [fails]}), ov_phi3.ConfigError("unreadable"),
        ("Hi", {"timeout": "soon"}), "Hi",
    ]  # fmt: skip
    outcomes = many.generate_many(rows, max_new_tokens=2).results()
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == [
        "GenerationResult", "PromptError", "ConfigError", "PromptError", "ContextOverflowError", "PromptError",
        "GenerationError", "ConfigError", "ConfigError", "GenerationResult",
    ]  # fmt: skip
    assert isinstance(outcomes[6].__cause__, ZeroDivisionError)


def test_what_is_wrong_with_the_call_is_raised(many: ov_phi3.Pipeline) -> None:
    with pytest.raises(ov_phi3.ConfigError, match="temprature"):
        many.generate_many(PROMPTS, temprature=1)
    with pytest.raises(TypeError, match="list of prompts"):
        many.generate_many("Hi")
    with pytest.raises(TypeError, match="on_progress"):
        many.generate_many(PROMPTS, on_progress=3)  # type: ignore[arg-type]
    assert many.generate_many([]).results() == []


def test_seeds_follow_from_seed_and_index(many: ov_phi3.Pipeline) -> None:
    options = {"max_new_tokens": 8, "temperature": 2.0, "seed": 7}
    outcomes = many.generate_many(["Hi"] * 6, **options).results()
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) > 1
    for index, outcome in enumerate(outcomes):
        alone = many.generate("Hi", **{**options, "seed": row_seed(7, index)})
        assert alone.token_ids == outcome.token_ids
        assert outcome.config.seed == row_seed(7, index)
    assert many.generate_many([("Hi", {"seed": 3})], **options).results()[0].config.seed == 3
    assert row_seed(7, 0) == 4127154647  # files of an interrupted batch depend on it


def test_rows_with_a_common_beginning_find_it_in_the_cache(many: ov_phi3.Pipeline) -> None:
    common = "You answer about the town of Quadragint, " * 20
    rows = [[{"role": "system", "content": common}, {"role": "user", "content": text}] for text in PROMPTS]
    mixed = [row for pair in zip(rows, PROMPTS, strict=True) for row in pair]
    outcomes = many.generate_many(mixed, max_new_tokens=3).results()[::2]
    shared = len(many.tokenizer.encode(common)) - 1
    reused = sorted(outcome.metrics.reused_tokens for outcome in outcomes)
    assert reused[0] < shared  # the first one computes it
    assert min(reused[1:]) >= shared - 32


def test_progress_is_reported_and_may_stop_the_batch(many: ov_phi3.Pipeline) -> None:
    seen: list[tuple[int, int | None]] = []
    many.generate_many(PROMPTS, max_new_tokens=1, on_progress=lambda *args: seen.append(args)).results()
    assert seen == [(n, 5) for n in range(1, 6)]
    many.generate_many(iter(PROMPTS[:1]), max_new_tokens=1, on_progress=lambda *args: seen.append(args)).results()
    assert seen[-1] == (1, None)

    def stop(done: int, total: int | None) -> None:
        raise InterruptedError

    batch = many.generate_many(PROMPTS, max_new_tokens=1, on_progress=stop)
    with pytest.raises(InterruptedError):
        next(batch)
    assert list(batch) == []


def test_leaving_early_cancels_the_rest(make: MakePipe) -> None:
    pipe, _ = make([[5]] * 50, concurrency=2)
    with pipe.generate_many(["Hi"] * 20, max_new_tokens=1) as batch:
        assert next(batch)[1].token_ids == [5]
    assert list(batch) == []
    for _ in pipe.generate_many(["Hi"] * 20, max_new_tokens=1):
        break
    gc.collect()
    batch = pipe.generate_many(["Hi"] * 20, max_new_tokens=1)
    next(batch)
    pipe.close()  # waits for every reply: those that were dropped have been cancelled
    left = batch.results()
    assert len(left) == 19
    assert isinstance(left[-1], ov_phi3.ClosedError)
