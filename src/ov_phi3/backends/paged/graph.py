"""The exported graph with paged attention: block tables as inputs, logits of chosen rows, LongRoPE factors per token.

This is the only module that uses `openvino._offline_transformations`, which is private to OpenVINO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.paged.lora import add_adapters
from ov_phi3.errors import ModelError
from ov_phi3.system.core import import_openvino, shared_core

if TYPE_CHECKING:
    from ov_phi3.model.adapter import Adapter

__all__ = ["LONG_ROPE", "ROWS", "PagedGraph", "read_paged_graph"]

ROWS = "logits_rows"
"""Input that selects the tokens of a step whose logits are returned; int64, shape [rows]."""

LONG_ROPE = "long_rope"
"""Input that selects the rotary factors of each token of a LongRoPE model; bool, shape [tokens, 1]."""


@dataclass(frozen=True)
class PagedGraph:
    """A model with paged attention, ready to be compiled.

    Attributes:
        model: the `openvino.Model`. Its inputs are `input_ids` [tokens], `position_ids` [tokens], `past_lens`
        [sequences],
            `subsequence_begins` [sequences + 1], `block_indices`, `block_indices_begins` [sequences + 1],
            `max_context_len` [], `ROWS`, for a LongRoPE model `LONG_ROPE`, and the caches `key_cache.N`,
            `value_cache.N`.
        has_long_rope: whether it has the input `LONG_ROPE`.
    """

    model: Any
    has_long_rope: bool


def read_paged_graph(
    xml: Path, rope_boundary: int | None, adapters: Sequence[tuple[Adapter, float]] = ()
) -> PagedGraph:
    """Read an exported model and transform it.

    Args:
        xml: the model's `.xml` file.
        rope_boundary: see `ModelInfo.rope_boundary`; None if the boundary cannot be reached.
        adapters: LoRA adapters to add to its layers, each with its factor.

    Raises:
        ModelError: the graph does not have the structure that the transformations are made for.
    """
    import_openvino()
    from openvino._offline_transformations import paged_attention_transformation

    model = shared_core().read_model(xml)
    try:
        paged_attention_transformation(model)
    except RuntimeError as exc:
        raise ModelError(
            f"{xml} cannot be converted to paged attention ({str(exc).splitlines()[-1].strip()}). Export it again, or "
            "load it with backend='llm_pipeline'."
        ) from exc
    add_adapters(model, adapters, xml)
    parameters = [_select_rows(model, xml)]
    if rope_boundary is not None:
        parameters.append(_select_factors(model, xml))
    model.add_parameters(parameters)
    model.validate_nodes_and_infer_types()
    return PagedGraph(model, rope_boundary is not None)


def _parameter(shape: list[int], dtype: Any, name: str) -> Any:
    from openvino import opset13

    parameter = opset13.parameter(shape, dtype=dtype, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _select_rows(model: Any, xml: Path) -> Any:
    """Select the rows in front of the output layer, whose product is the widest of all."""
    from openvino import opset13

    node = model.outputs[0].get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if not node.get_input_size():
            raise ModelError(f"{xml} has no output layer in front of its logits. Load it with backend='llm_pipeline'.")
        node = node.input_value(0).get_node()
    rows = _parameter([-1], np.int64, ROWS)
    selected = opset13.gather(node.input(0).get_source_output(), rows, opset13.constant(np.int64(0)))
    node.input(0).replace_source_output(selected.output(0))
    return rows


def _select_factors(model: Any, xml: Path) -> Any:
    """Replace the graph's choice of the rotary factors, one per step, by a choice per token.

    The exported graph has one Select with a scalar condition over two constants of shape [head_dim / 2], and expands
    its result to [1, head_dim / 2, 1]. With the condition as an input of shape [tokens, 1] the result has a row per
    token, and is reshaped to [tokens, head_dim / 2, 1].
    """
    from openvino import opset13

    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}

    def find(ending: str) -> Any:
        node = next((node for name, node in nodes.items() if name.endswith(f"rotary_emb/{ending}")), None)
        if node is None:
            raise ModelError(
                f"{xml} does not choose its LongRoPE factors in the known way (no {ending}). Export it again with "
                "optimum-intel 2.0 or later, or load it with backend='llm_pipeline'."
            )
        return node

    select = find("aten::where/Select")
    flags = _parameter([-1, 1], bool, LONG_ROPE)
    per_token = opset13.select(flags, select.input_value(1), select.input_value(2))
    for target in list(select.output(0).get_target_inputs()):
        target.replace_source_output(per_token.output(0))
    half = int(select.input_value(1).get_partial_shape()[0].get_length())
    source = find("aten::unsqueeze/Unsqueeze").input_value(0)
    shape = opset13.constant(np.array([-1, half, 1], np.int64))
    factors = opset13.reshape(source, shape, False)
    for target in list(find("aten::unsqueeze/Unsqueeze_1").output(0).get_target_inputs()):
        target.replace_source_output(factors.output(0))
    return flags
