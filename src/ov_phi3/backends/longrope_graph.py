"""The graph of a LongRoPE model, edited so that a token's id says which rotary factors to use.

The exported graph chooses between the short and the long factors in each inference call, by the highest position in it.
Two things go wrong in an engine that caches: a prefix computed with the short factors is matched by a longer prompt
that needs the long ones, and the first chunk of a long prompt is computed as a short sequence. Both are avoided if a
token of a long sequence has another id than the same token of a short one, because prefix caches match ids. The edited
graph accepts such marked ids: a negative id, `-1 - id`, stands for `id` and selects the long factors.

::

    token = max(id, -1 - id)
    long  = highest position + 1 > boundary  or  lowest id < 0

The graph is edited as text, in which weights are only references into the `.bin` file: nothing is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ov_phi3.errors import ModelError
from ov_phi3.model.ir import IrGraph, Layer, Output

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["UnknownGraph", "mark_ids", "with_marked_ids"]


class UnknownGraph(Exception):  # noqa: N818 - not a failure: the caller runs without the edit
    """The graph does not have the structure that the edit is made for."""


def mark_ids(ids: NDArray[np.int64], boundary: int) -> NDArray[np.int64]:
    """The ids of a sequence past the boundary, as the edited graph expects them; int64, shape [tokens].

    Positions from the boundary on select the long factors by themselves. They keep their ids, as generated tokens do,
    so that a sequence is matched by the ids under which the engine cached it.
    """
    marked = np.array(ids, dtype=np.int64)
    marked[:boundary] = -1 - marked[:boundary]
    return marked


def with_marked_ids(xml: Path, boundary: int) -> str:
    """The text of a model's `.xml` file, edited so that it accepts marked ids.

    Raises:
        UnknownGraph: the choice of the factors was not found in it.
    """
    try:
        graph = IrGraph.read(xml)
        ids = _parameter(graph, "input_ids").outputs[0]
        choice = _find_choice(graph, boundary)
        _accept_marked_ids(graph, ids, choice)
        _select_by_marks(graph, ids, choice)
        return graph.to_xml()
    except ModelError as exc:
        raise UnknownGraph(str(exc)) from exc


class _Choice(NamedTuple):
    """Greater(ReduceMax(position_ids) + 1, boundary).

    Attributes:
        greater: the comparison.
        one: the constant 1.
        axes: the axes of the maximum.
    """

    greater: Layer
    one: Output
    axes: Output


def _accept_marked_ids(graph: IrGraph, ids: Output, choice: _Choice) -> None:
    """Token = max(id, -1 - id), for all that reads the ids but not only their shape."""
    readers = [edge for edge in graph.edges_from(ids.layer) if graph.layer(edge.reader).type != "ShapeOf"]
    negative = graph.add("Negative", "I64", ids, rank=2)
    other = graph.add("Subtract", "I64", negative, choice.one, rank=2, auto_broadcast="numpy")
    token = graph.add("Maximum", "I64", ids, other, rank=2, auto_broadcast="numpy")
    graph.redirect(readers, token)


def _select_by_marks(graph: IrGraph, ids: Output, choice: _Choice) -> None:
    """Long = the exported condition, or lowest id < 0; the 0 is 1 - 1, as there is no constant of it."""
    readers = graph.edges_from(choice.greater.id)
    lowest = graph.add("ReduceMin", "I64", ids, choice.axes, rank=0, keep_dims="false")
    zero = graph.add("Subtract", "I64", choice.one, choice.one, rank=0, auto_broadcast="numpy")
    marked = graph.add("Less", "BOOL", lowest, zero, rank=0, auto_broadcast="numpy")
    either = graph.add("LogicalOr", "BOOL", choice.greater.outputs[0], marked, rank=0, auto_broadcast="numpy")
    graph.redirect(readers, either)


def _parameter(graph: IrGraph, name: str) -> Layer:
    parameter = graph.parameter(name)
    if parameter is None:
        raise UnknownGraph(f"its graph has no input {name}")
    return parameter


def _find_choice(graph: IrGraph, boundary: int) -> _Choice:
    positions = _parameter(graph, "position_ids").id
    for greater in graph.layers("Greater"):
        total, limit = (graph.layer(output.layer) for output in greater.inputs)
        if total.type != "Add" or graph.int64(greater.inputs[1]) != boundary:
            continue
        highest, one = graph.layer(total.inputs[0].layer), total.inputs[1]
        if highest.type != "ReduceMax" or graph.int64(one) != 1:
            continue
        if limit.type == "Const" and highest.inputs[0].layer == positions:
            return _Choice(greater, one, highest.inputs[1])
    raise UnknownGraph("its graph does not choose the factors in the known way; export it again")
