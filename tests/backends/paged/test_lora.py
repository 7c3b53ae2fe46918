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


@pytest.mark.parametrize("name", [f"__module.{LAYER}/aten::add/Add", "MatMul_17"])
def test_a_graph_without_the_layer_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"m\.xml has no linear layer named {LAYER}.*Export it again"):
        add(graph(name), (Stub(LAYER, [[1, 2]], [[1], [0]]), 1.0))
