"""OpenVINO's transformation to paged attention is private: this test says what changed when it does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import ModelInfo
from ov_phi3.backends.paged.graph import LONG_ROPE, ROWS, read_paged_graph

MODULE = "openvino._offline_transformations"
FUNCTION = "paged_attention_transformation"
# Input -> element type and rank; those of the caches come in addition, one pair for each layer.
INPUTS = {
    "input_ids": ("i64", 1),
    "position_ids": ("i64", 1),
    "past_lens": ("i32", 1),
    "subsequence_begins": ("i32", 1),
    "block_indices": ("i32", 1),
    "block_indices_begins": ("i32", 1),
    "max_context_len": ("i32", 0),
}
OURS = {ROWS: ("i64", 1), LONG_ROPE: ("boolean", 2)}


def described(ports: Any) -> dict[str, tuple[str, int]]:
    return {
        port.get_any_name(): (port.element_type.to_string(), port.partial_shape.rank.get_length())
        for port in ports
        if not port.get_any_name().startswith(("key_cache.", "value_cache."))
    }


def change(expected: dict[str, tuple[str, int]], present: dict[str, tuple[str, int]]) -> str:
    """In one line, what a new release of OpenVINO changed; "" for nothing."""
    parts = [
        *(f"{name} is gone" for name in expected.keys() - present.keys()),
        *(f"{name} {present[name]} is new" for name in present.keys() - expected.keys()),
        *(
            f"{name} was {kind} and is {present[name]}"
            for name, kind in expected.items()
            if present.get(name, kind) != kind
        ),
    ]
    return "; ".join(sorted(parts))


def test_the_private_transformation_gives_the_known_inputs(tiny_fp32: Path) -> None:
    import openvino

    try:
        transform = getattr(importlib.import_module(MODULE), FUNCTION)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"openvino {openvino.__version__} has no {MODULE}.{FUNCTION} any more: {error}", pytrace=False)
    model = openvino.Core().read_model(tiny_fp32 / "openvino_model.xml")
    transform(model)
    if changed := change(INPUTS, described(model.inputs)):
        pytest.fail(f"openvino {openvino.__version__} changed the inputs of paged attention: {changed}", pytrace=False)
    layers = ModelInfo.from_dir(tiny_fp32).num_layers
    caches = [name for port in model.inputs if (name := port.get_any_name()) not in INPUTS]
    assert sorted(caches) == sorted(f"{kind}_cache.{layer}" for kind in ("key", "value") for layer in range(layers))
    assert [port.get_any_name() for port in model.outputs] == ["logits"]


def test_the_graph_has_our_inputs_in_addition(tiny_fp32: Path, longrope: tuple[Path, Path, int]) -> None:
    plain = read_paged_graph(tiny_fp32 / "openvino_model.xml", None)
    assert described(plain.model.inputs) == {**INPUTS, ROWS: OURS[ROWS]}
    long = read_paged_graph(longrope[0] / "openvino_model.xml", longrope[2])
    assert described(long.model.inputs) == {**INPUTS, **OURS}


def test_a_change_is_named_in_one_line() -> None:
    other = {**INPUTS, "past_lens": ("i64", 1), "rotation": ("f32", 2)}
    del other["max_context_len"]
    assert change(INPUTS, other) == (
        "max_context_len is gone; past_lens was ('i32', 1) and is ('i64', 1); rotation ('f32', 2) is new"
    )
    assert change(INPUTS, dict(INPUTS)) == ""
