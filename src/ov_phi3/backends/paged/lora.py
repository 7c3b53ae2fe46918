"""LoRA adapters in the graph: the output of each linear layer plus the product of two small matrices.

The adapters are constants of the compiled model, so they hold for its life, and every sequence of a step has them. The
cache's keys and values are then those of the changed weights.

An export with AWQ has scaled the inputs of some layers, and their weights by the inverse (NNCF's `AWQ`, which inserts
a node `.../awq_mul` behind the activation function: https://arxiv.org/abs/2306.00978). A is then scaled like these
weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import ModelError
from ov_phi3.model.ir import AWQ_SCALE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.model.adapter import Adapter

__all__ = ["LINEAR", "add_adapters", "input_factors"]

LINEAR = re.compile(r"__module\.(?P<module>model\.layers\.\d+\.[\w.]+)/\w+::linear/MatMul")
"""Friendly name of a linear layer's product in an export by optimum-intel, such as
`__module.model.layers.0.mlp.down_proj/aten::linear/MatMul`."""


def add_adapters(model: Any, adapters: Sequence[tuple[Adapter, float]], xml: Path) -> None:
    """Add s * B A of every adapter to the linear layers of a graph.

    Several adapters of one layer take one pair of products: their A lie below each other, their s * B side by side.

    Args:
        model: the `openvino.Model`, which is changed.
        adapters: each with its factor s.
        xml: the model's `.xml` file, for the message.

    Raises:
        ModelError: the graph does not have a layer that an adapter changes, or scales its input in an unknown way, or
            an adapter's file cannot be read.
    """
    parts: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = defaultdict(list)
    for adapter, factor in adapters:
        for module, (a, b) in adapter.matrices().items():
            parts[module].append((a, np.float32(factor) * b))
    products = {
        match["module"]: node
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and (match := LINEAR.fullmatch(node.get_friendly_name()))
    }
    for module, pairs in parts.items():
        if module not in products:
            raise ModelError(
                f"{xml} has no linear layer named {module}, which an adapter changes. Export it again with "
                "ov_phi3.export(), or with its adapter=, which merges the adapter."
            )
        a, b = (np.concatenate(matrices, axis) for axis, matrices in enumerate(zip(*pairs, strict=True)))
        factors = input_factors(products[module], a.shape[1], xml)
        _add_product(products[module], a if factors is None else a / factors, b)


def input_factors(linear: Any, width: int, xml: Path) -> NDArray[np.float32] | None:
    """What AWQ multiplies the input channels of a linear layer with, shape [width]; None for nothing."""
    source = linear.input_value(0).get_node()
    behind = [source, *(value.get_node() for value in source.input_values())]
    scaled = next((node for node in behind if node.get_friendly_name().endswith(AWQ_SCALE)), None)
    if scaled is None:
        return None
    constant = scaled.input_value(1).get_node()
    if constant.get_type_name() == "Convert":
        constant = constant.input_value(0).get_node()
    if constant.get_type_name() != "Constant" or constant.get_data().size != width:
        raise ModelError(
            f"{xml} scales the inputs of {linear.get_friendly_name()} in an unknown way. Merge the adapter: "
            "ov_phi3.export(SOURCE, DIRECTORY, adapter=...)."
        )
    factors: NDArray[np.float32] = constant.get_data().astype(np.float32).reshape(width)
    return factors


def _add_product(linear: Any, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Let the users of a linear layer's output y = W x read y + B (A x)."""
    from openvino import opset13

    output = linear.output(0)
    users = list(output.get_target_inputs())
    inner = opset13.matmul(linear.input_value(0), opset13.constant(a), False, True)
    added = opset13.add(output, opset13.matmul(inner, opset13.constant(b), False, True))
    for user in users:
        user.replace_source_output(added.output(0))
