"""An exported model's graph, prepared for our own decode loop: logits of chosen rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ov_phi3.backends.longrope_graph import UnknownGraph, with_marked_ids
from ov_phi3.system.core import import_openvino, shared_core

__all__ = ["ROWS", "Graph"]

ROWS = "logits_rows"
"""Name of the input that selects the tokens of a pass whose logits are returned; int64, shape [rows]."""


class Graph:
    """A model read from its directory, ready to be compiled.

    Attributes:
        model: the `openvino.Model`.
        rows: whether it has the input `ROWS`. Without it, every pass returns the logits of all tokens.
        marks: whether it accepts marked ids, see `longrope_graph`.
        problem: why it does not, for a model that needs them.
    """

    def __init__(self, model_dir: Path, rope_boundary: int | None) -> None:
        xml = model_dir / "openvino_model.xml"
        self.marks, self.problem = False, ""
        self._weights: Any = None
        if rope_boundary is not None:
            try:
                text = with_marked_ids(xml, rope_boundary)
            except UnknownGraph as exc:
                self.problem = str(exc)
            else:
                weights = np.memmap(xml.with_suffix(".bin"), dtype=np.uint8, mode="c")
                self._weights = import_openvino().Tensor(weights, shared_memory=True)
                self.model = shared_core().read_model(text.encode(), self._weights)
                self.marks = True
        if not self.marks:
            self.model = shared_core().read_model(xml)
        self.rows = _choose_rows(self.model)


def _choose_rows(model: Any) -> bool:
    """Select the rows in front of the last matrix product, which is the widest.

    Without it the logits of a prompt of 2,048 tokens take 400 MB with a vocabulary of 49,152.
    """
    import openvino as ov
    import openvino.opset13 as ops

    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        return False
    rows = ops.parameter([-1], ov.Type.i64, name=ROWS)
    rows.output(0).get_tensor().set_names({ROWS})
    chosen = ops.gather(head.input_value(0), rows, ops.constant(1, ov.Type.i64))
    head.input(0).replace_source_output(chosen.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
    return True
