"""LoRA adapters in a graph: which nodes get a product, and a graph without the layer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import openvino
import pytest

from ov_phi3 import ModelError
from ov_phi3.backends.paged.lora import add_adapters
from ov_phi3.model.adapter import Adapter

LAYER = "model.layers.0.mlp.down_proj"


class Stub:
    """The matrices of an adapter."""

    def __init__(self, module: str, a: list[list[float]], b: list[list[float]]) -> None:
        self.module, self.a, self.b = module, np.array(a, np.float32), np.array(b, np.float32)

    def matrices(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {self.module: (self.a, self.b)}


def graph(name: str) -> openvino.Model:
    """Y = x I + 1 for x of shape [rows, 2], with the product under a friendly name."""
    x = openvino.opset13.parameter([-1, 2], np.float32, "x")
    linear = openvino.opset13.matmul(x, openvino.opset13.constant(np.eye(2, dtype=np.float32)), False, True)
    linear.set_friendly_name(name)
    return openvino.Model([openvino.opset13.add(linear, openvino.opset13.constant(np.float32(1)))], [x], "m")


def add(model: openvino.Model, *adapters: tuple[Stub, float]) -> None:
    add_adapters(model, [(cast("Adapter", adapter), factor) for adapter, factor in adapters], Path("m.xml"))


@pytest.mark.parametrize("kind", ["aten", "ov_ext"])
def test_products_of_all_adapters_are_added(kind: str) -> None:
    model = graph(f"__module.{LAYER}/{kind}::linear/MatMul")
    one, two = Stub(LAYER, [[1, 2]], [[1], [0]]), Stub(LAYER, [[0, 1], [1, 0]], [[1, 0], [0, 1]])
    add(model, (one, 2.0), (two, -0.5))
    x = np.array([[1, 10], [3, 0]], np.float32)
    y = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    change = 2.0 * one.b @ one.a - 0.5 * two.b @ two.a
    np.testing.assert_allclose(y, x @ (np.eye(2) + change).T + 1, rtol=1e-6)


def awq_graph(name: str, factors: openvino.Node) -> openvino.Model:
    """y = x W for x = act(gate) * up, where AWQ has scaled act's result by 4 and 0.5, and W = I by the inverse."""
    gate, up = (openvino.opset13.parameter([-1, 2], np.float32, name) for name in ("gate", "up"))
    scaled = openvino.opset13.multiply(openvino.opset13.relu(gate), factors)
    scaled.set_friendly_name("__module.model.layers.0.mlp.act/aten::silu/Swish/awq_mul")
    weights = openvino.opset13.constant(np.diag([0.25, 2.0]).astype(np.float32))
    linear = openvino.opset13.matmul(openvino.opset13.multiply(up, scaled), weights, False, True)
    linear.set_friendly_name(name)
    return openvino.Model([linear], [gate, up], "m")


@pytest.mark.parametrize("half", [False, True])
def test_awq_has_scaled_the_input(half: bool) -> None:
    values = np.array([[4.0, 0.5]], np.float16 if half else np.float32)
    factors = openvino.opset13.constant(values)
    model = awq_graph(
        f"__module.{LAYER}/aten::linear/MatMul", openvino.opset13.convert(factors, "f32") if half else factors
    )
    stub = Stub(LAYER, [[1, 2]], [[1], [3]])
    add(model, (stub, 1.0))
    gate, up = np.array([[1, 2]], np.float32), np.array([[3, 10]], np.float32)
    y = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([gate, up])[0]
    np.testing.assert_allclose(y, gate * up @ (np.eye(2) + stub.b @ stub.a).T, rtol=1e-6)


def test_an_unknown_scale_is_refused() -> None:
    factors = openvino.opset13.sqrt(openvino.opset13.constant(np.array([[4.0, 0.5]], np.float32)))
    model = awq_graph(f"__module.{LAYER}/aten::linear/MatMul", factors)
    with pytest.raises(ModelError, match=r"m\.xml scales the inputs of .*down_proj.* in an unknown way\. Merge"):
        add(model, (Stub(LAYER, [[1, 2]], [[1], [0]]), 1.0))


@pytest.mark.parametrize("name", [f"__module.{LAYER}/aten::add/Add", "MatMul_17"])
def test_a_graph_without_the_layer_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"m\.xml has no linear layer named {LAYER}.*Export it again"):
        add(graph(name), (Stub(LAYER, [[1, 2]], [[1], [0]]), 1.0))
