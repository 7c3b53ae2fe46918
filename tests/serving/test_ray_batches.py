"""Batches in actors: the class alone, and 500 rows over a Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ov_phi3
from ov_phi3.many import row_seed
from ov_phi3.serving.properties import EXACT
from ov_phi3.serving.ray import BatchGenerator, fetch_model

SYSTEM = "You are a helpful assistant, and you answer briefly. " * 6
OPTIONS = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 20, "seed": 3, "ignore_eos": True}


def column(values: list[Any]) -> np.ndarray[Any, Any]:
    """As Ray Data hands a column of strings or structs over."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


# -- the class alone ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tiny_fp32: Path, device: str) -> BatchGenerator:
    return BatchGenerator(tiny_fp32, OPTIONS, system="Be brief.", concurrency=3, device=device)


@pytest.fixture(scope="module")
def exact(tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    with ov_phi3.load(tiny_fp32, device=device, concurrency=8, ov_config=dict(EXACT)) as pipe:
        yield pipe


def test_a_batch_keeps_its_columns_and_its_order(generator: BatchGenerator, exact: ov_phi3.Pipeline) -> None:
    conversation = [{"role": "system", "content": "x", "name": None}, {"role": "user", "content": "Hi", "name": None}]
    batch = {
        "id": np.array([7, 8, 9, 10, 11]),
        "prompt": column(["Hello", None, "Again", None, "Hello"]),
        "messages": column([None, column(conversation), None, None, None]),
        "options": column([None, {"seed": 5, "max_new_tokens": 2, "temperature": None}, {"nosuch": 1}, None, {}]),
    }
    replies = generator(batch)
    assert all(replies[name] is batch[name] for name in batch)
    assert [text.partition(":")[0] for text in replies["error"]] == ["", "", "ConfigError", "ConfigError", ""]
    assert replies["text"][0] != replies["text"][4]  # another id, another draw
    system = {"role": "system", "content": "Be brief."}
    own = exact.generate([system, {"role": "user", "content": "Hello"}], **{**OPTIONS, "seed": row_seed(3, 7)})
    assert replies["text"][0] == own.text
    own = exact.generate(conversation, **{**OPTIONS, "seed": 5, "max_new_tokens": 2})
    assert (replies["text"][1], replies["generated_tokens"][1]) == (own.text, 2)
    assert (replies["text"][2], replies["finish_reason"][2], replies["prompt_tokens"][2]) == ("", "", 0)


def test_calls_of_tools_are_json(tiny_fp32: Path, device: str) -> None:
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    options = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "add"}}}
    calling = BatchGenerator(tiny_fp32, {"max_new_tokens": 60}, device=device, concurrency=1)
    replies = calling({"prompt": column(["Hi"]), "options": column([options])})
    assert json.loads(replies["tool_calls"][0]) == [{"name": "add", "arguments": {}}]


def test_one_row_after_another_on_llm_pipeline(tiny_fp32: Path, device: str) -> None:
    options: dict[str, Any] = {"device": device, "backend": "llm_pipeline"}
    with pytest.raises(ov_phi3.ConfigError, match="concurrency=2 does not work with backend='llm_pipeline'"):
        BatchGenerator(tiny_fp32, concurrency=2, **options)
    replies = BatchGenerator(tiny_fp32, {"max_new_tokens": 2}, **options)({"prompt": column(["Hi", "Hello"])})
    assert replies["error"].tolist() == ["", ""]


def test_rows_that_are_none(generator: BatchGenerator) -> None:
    with pytest.raises(ov_phi3.ConfigError, match="'prompt' or 'messages'"):
        generator({"id": np.array([1]), "text": column(["a"])})
    with pytest.raises(ov_phi3.ConfigError, match="id_column"):
        generator({"prompt": column(["a"])})


# -- a model from shared storage ---------------------------------------------------------------------------------------


@pytest.fixture
def shared(tiny_fp32: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the model, and the hash of its manifest."""
    model = tmp_path / "shared" / "model"
    shutil.copytree(tiny_fp32, model)
    return model, hashlib.sha256((model / "ov_phi3.json").read_bytes()).hexdigest()


def test_a_model_is_copied_once_and_checked(shared: tuple[Path, str], tmp_path: Path) -> None:
    source, digest = shared
    copy = fetch_model(source, digest, tmp_path / "cache")
    assert ov_phi3.ModelInfo.from_dir(copy).fingerprint == ov_phi3.ModelInfo.from_dir(source).fingerprint
    shutil.rmtree(source)
    assert fetch_model(source, digest, tmp_path / "cache") == copy


def test_another_or_a_damaged_model_is_refused(shared: tuple[Path, str], tmp_path: Path) -> None:
    source, digest = shared
    with pytest.raises(ov_phi3.ConfigError, match="64 hexadecimal"):
        fetch_model(source, "abc")
    with pytest.raises(ov_phi3.ModelError, match="another model"):
        fetch_model(source, "0" * 64, tmp_path / "cache")
    (source / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes()[:-1] + b"?")
    with pytest.raises(ov_phi3.ModelError, match="damaged: tokenizer.json has another SHA-256"):
        fetch_model(source, digest, tmp_path / "cache")
    with (source / "openvino_model.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ov_phi3.ModelError, match=r"damaged: openvino_model.bin has 100 bytes"):
        fetch_model(source, digest, tmp_path / "cache")
    with pytest.raises(ov_phi3.ModelError, match="cannot be copied"):
        fetch_model(tmp_path / "nosuch", digest, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")] == []


# -- a cluster ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes of one CPU each, on this machine. A dead node is noticed after 2 s."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    if sys.platform == "win32":
        pytest.skip("Ray's clusters of several nodes on one machine are for Linux")
    from ray.cluster_utils import Cluster

    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.filterwarnings("default")
def test_rows_survive_the_death_of_a_node(cluster: Any, exact: ov_phi3.Pipeline, device: str, tmp_path: Path) -> None:
    """All rows, each once, in order, and equal to those of one process; the common prompt is prefilled once in all."""
    import ray

    prefix = exact.prefill([{"role": "system", "content": SYSTEM}])
    prefix.save(tmp_path / "system.kv")
    rows: list[Any] = [{"id": at, "prompt": f"Say {at}."} for at in range(500)]
    rows[123]["options"] = 5
    messages = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}] for row in rows]
    alone = exact.generate_many([(m, {"seed": row_seed(3, at)}) for at, m in enumerate(messages)], **OPTIONS).results()
    expected = [getattr(result, "text", "") for result in alone]
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    constructor = {"model_dir": exact.info.path, "config": OPTIONS, "device": device, "concurrency": 8}
    constructor |= {"prefixes": [tmp_path / "system.kv"], "system": SYSTEM, "metrics": True}
    replies = ray.data.from_items(rows, override_num_blocks=20).map_batches(
        BatchGenerator,
        fn_constructor_kwargs=constructor,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
        batch_size=25,
    )
    finished = []
    for row in replies.iter_rows():
        finished.append(row)
        if len(finished) == 50:
            cluster.remove_node(nodes[1], allow_graceful=False)
    assert [row["id"] for row in finished] == list(range(500))
    wrong = [row["id"] for row, text in zip(finished, expected, strict=True) if row["text"] != text]
    assert wrong == [123]
    assert [row["id"] for row in finished if row["error"]] == [123]
    assert {row["reused_tokens"] for row in finished if not row["error"]} == {len(prefix)}
