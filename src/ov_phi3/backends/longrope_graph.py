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

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["UnknownGraph", "mark_ids", "with_marked_ids"]


class UnknownGraph(Exception):  # noqa: N818 - not a failure: the caller does without
    """The graph is not one that the edit is for."""


def mark_ids(ids: NDArray[np.int64], boundary: int) -> NDArray[np.int64]:
    """The ids of a sequence past the boundary as the edited graph takes them; int64, shape [tokens].

    Positions from the boundary on ask for the long factors by themselves. They keep their ids, as generated ones do,
    so that a sequence is found again with the ids under which the engine cached it.
    """
    marked = np.array(ids, dtype=np.int64)
    marked[:boundary] = -1 - marked[:boundary]
    return marked


def with_marked_ids(xml: Path, boundary: int) -> str:
    """The text of a model's `.xml` file, edited so that it takes marked ids.

    Raises:
        UnknownGraph: the choice of factors was not found in it.
    """
    return _Layers(ET.parse(xml)).edited(boundary, xml.with_suffix(".bin"))


class _Layers:
    """Layers and edges of an OpenVINO IR, version 11."""

    def __init__(self, tree: ET.ElementTree[ET.Element[str]]) -> None:
        root = tree.getroot()
        self._root = root
        self._layers = _found(root, "layers")
        self._edges = _found(root, "edges")
        self._by_id = {layer.get("id", ""): layer for layer in self._layers}
        self._sources = {
            (edge.get("to-layer", ""), edge.get("to-port", "")): (edge.get("from-layer", ""), edge.get("from-port", ""))
            for edge in self._edges
        }
        self._next = 1 + max(int(key) for key in self._by_id)

    def edited(self, boundary: int, weights: Path) -> str:
        ids = self._parameter("input_ids")
        greater, one, axes = self._choice(boundary, weights)
        readers = [edge for edge in self._edges if edge.get("from-layer") == ids and self._type(edge) != "ShapeOf"]
        choosers = [edge for edge in self._edges if edge.get("from-layer") == greater[0]]
        # token = max(id, -1 - id)
        negative = self._add("Negative", "I64", (ids, "0"), rank=2)
        other = self._add("Subtract", "I64", negative, one, rank=2, broadcast=True)
        token = self._add("Maximum", "I64", (ids, "0"), other, rank=2, broadcast=True)
        for edge in readers:
            edge.set("from-layer", token[0])
            edge.set("from-port", token[1])
        # long = what it was, or lowest id < 0, which is 1 - 1
        lowest = self._add("ReduceMin", "I64", (ids, "0"), axes, rank=0, data={"keep_dims": "false"})
        zero = self._add("Subtract", "I64", one, one, rank=0, broadcast=True)
        marked = self._add("Less", "BOOL", lowest, zero, rank=0, broadcast=True)
        either = self._add("LogicalOr", "BOOL", greater, marked, rank=0, broadcast=True)
        for edge in choosers:
            edge.set("from-layer", either[0])
            edge.set("from-port", either[1])
        return ET.tostring(self._root, encoding="unicode")

    # -- finding -----------------------------------------------------------------------------------------------------

    def _parameter(self, name: str) -> str:
        for layer in self._layers:
            if layer.get("type") == "Parameter" and layer.get("name") == name:
                return layer.get("id", "")
        raise UnknownGraph(f"its graph has no input {name}")

    def _choice(self, boundary: int, weights: Path) -> tuple[tuple[str, str], tuple[str, str], tuple[str, str]]:
        """Greater(ReduceMax(position_ids) + 1, boundary): its output, the 1 and the axes of the maximum."""
        positions = self._parameter("position_ids")
        for layer in self._layers:
            if layer.get("type") != "Greater":
                continue
            total, limit = self._inputs(layer)
            if self._kind(total) != "Add" or self._constant(limit, weights) != boundary:
                continue
            highest, one = self._inputs(self._by_id[total[0]])
            if self._kind(highest) != "ReduceMax" or self._constant(one, weights) != 1:
                continue
            source, axes = self._inputs(self._by_id[highest[0]])
            if source[0] == positions:
                return (layer.get("id", ""), _found(layer, "output/port").get("id", "")), one, axes
        raise UnknownGraph("its graph does not choose the factors in the way that is known; export it again")

    def _inputs(self, layer: ET.Element) -> list[tuple[str, str]]:
        ports = layer.findall("input/port")
        return [self._sources[(layer.get("id", ""), port.get("id", ""))] for port in ports]

    def _kind(self, output: tuple[str, str]) -> str:
        return self._by_id[output[0]].get("type", "")

    def _type(self, edge: ET.Element) -> str:
        return self._by_id[edge.get("to-layer", "")].get("type", "")

    def _constant(self, output: tuple[str, str], weights: Path) -> int | None:
        """The value of a constant of one int64; None for anything else."""
        layer = self._by_id[output[0]]
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None or data.get("element_type") != "i64" or data.get("size") != "8":
            return None
        with weights.open("rb") as file:
            file.seek(int(data.get("offset", "0")))
            return int.from_bytes(file.read(8), "little", signed=True)

    # -- adding ------------------------------------------------------------------------------------------------------

    def _add(
        self,
        kind: str,
        precision: str,
        *inputs: tuple[str, str],
        rank: int,
        broadcast: bool = False,
        data: dict[str, str] | None = None,
    ) -> tuple[str, str]:
        """Append a layer of opset1 and the edges to it; returns its output."""
        key = str(self._next)
        self._next += 1
        layer = ET.SubElement(self._layers, "layer", id=key, name=f"ov_phi3/{kind}_{key}", type=kind, version="opset1")
        attributes = {"auto_broadcast": "numpy"} if broadcast else data
        if attributes:
            ET.SubElement(layer, "data", attributes)
        group = ET.SubElement(layer, "input")
        for port, source in enumerate(inputs):
            group.append(self._port(str(port), source))
            edge = {"from-layer": source[0], "from-port": source[1], "to-layer": key, "to-port": str(port)}
            ET.SubElement(self._edges, "edge", edge)
        out = ET.SubElement(ET.SubElement(layer, "output"), "port", id=str(len(inputs)), precision=precision)
        for _ in range(rank):
            ET.SubElement(out, "dim").text = "-1"
        self._by_id[key] = layer
        return key, str(len(inputs))

    def _port(self, port: str, source: tuple[str, str]) -> ET.Element:
        """An input port like the output that feeds it."""
        for other in self._by_id[source[0]].findall("output/port"):
            if other.get("id") == source[1]:
                made = ET.Element("port", id=port, precision=other.get("precision", ""))
                for dim in other.findall("dim"):
                    ET.SubElement(made, "dim").text = dim.text
                return made
        raise UnknownGraph(f"layer {source[0]} of its graph has no output {source[1]}")


def _found(parent: ET.Element, path: str) -> ET.Element:
    found = parent.find(path)
    if found is None:
        raise UnknownGraph(f"a part of its graph has no {path}")
    return found
