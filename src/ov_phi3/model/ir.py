"""Read OpenVINO IR files: the `.xml` that describes a graph, and the `.bin` that holds its constants.

`IrSummary` scans the XML as bytes in milliseconds, which is enough for checks. `IrGraph` parses it, and can also
edit the graph. In the XML, constants are only an offset and a size in the `.bin` file, so editing copies no weights.
Neither loads a model or needs OpenVINO.

Format: https://docs.openvino.ai, "OpenVINO IR format", version 11.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union
from xml.etree import ElementTree as ET

from ov_phi3.errors import ModelError

__all__ = ["AWQ_SCALE", "Constant", "Edge", "IrGraph", "IrSummary", "Layer", "Output", "RtInfo"]

AWQ_SCALE = "/awq_mul"
"""End of the name of a node with which NNCF's AWQ scales the inputs of a layer."""

_CONSTANT = re.compile(rb'<data element_type="(\w+)" shape="[^"]*" offset="(\d+)" size="(\d+)"')

RtInfo = Mapping[str, Union[str, "RtInfo"]]


# -- summary -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IrSummary:
    """The facts about an IR that its XML gives without parsing the graph.

    Attributes:
        xml: the `.xml` file's bytes.
        weight_bytes: size of the `.bin` file, in bytes.
        precisions: bytes of constants by element type ("i4", "u8", "f16", ...).
        rt_info: the exporter's notes about the model (`<rt_info>`); {} if they cannot be parsed.
    """

    xml: bytes
    weight_bytes: int
    precisions: Mapping[str, int]
    rt_info: RtInfo

    @classmethod
    def read(cls, directory: Path, stem: str) -> IrSummary:
        """Read `<stem>.xml`, and compare it with the size of `<stem>.bin`.

        Raises:
            ModelError: the XML is cut off or is not an IR, or the `.bin` is shorter than the XML's constants need.
        """
        xml_file, bin_file = directory / f"{stem}.xml", directory / f"{stem}.bin"
        try:
            xml, size = xml_file.read_bytes(), bin_file.stat().st_size
        except OSError as error:
            raise ModelError(f"{error.filename or xml_file} cannot be read: {error.strerror or error}.") from error
        if b"<net " not in xml[:4096] or not xml.rstrip().endswith(b"</net>"):
            raise ModelError(f"{xml_file} is not an OpenVINO model, or is cut off ({len(xml)} bytes); export again.")
        needed, precisions = _scan_constants(xml)
        if size < needed:
            raise ModelError(
                f"{bin_file} is cut off: it has {size} bytes, and {xml_file.name} needs {needed}. "
                "Copy it again, or export again."
            )
        return cls(xml, size, precisions, _rt_info(xml))

    @property
    def stateful(self) -> bool:
        """Whether the KV cache is a state of the model, which both backends need."""
        return b'type="ReadValue"' in self.xml

    @property
    def scales_inputs(self) -> bool:
        """Whether AWQ has scaled the inputs of layers, and their weights by the inverse."""
        return f'{AWQ_SCALE}"'.encode() in self.xml

    def info(self, *keys: str) -> str | None:
        """The value under a path of keys in `rt_info`, or None."""
        value = self._at(keys)
        return value if isinstance(value, str) and value else None

    def section(self, *keys: str) -> dict[str, str]:
        """The plain values directly under a path of keys in `rt_info`."""
        value = self._at(keys)
        return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, Mapping) else {}

    def _at(self, keys: Iterable[str]) -> str | RtInfo | None:
        value: str | RtInfo | None = self.rt_info
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def _scan_constants(xml: bytes) -> tuple[int, dict[str, int]]:
    """End of the last constant in the `.bin`, and bytes of constants by element type."""
    end, sizes = 0, dict[str, int]()
    for element_type, offset, size in _CONSTANT.findall(xml):
        name = element_type.decode()
        sizes[name] = sizes.get(name, 0) + int(size)
        end = max(end, int(offset) + int(size))
    return end, sizes


def _rt_info(xml: bytes) -> RtInfo:
    """The `<rt_info>` of the whole model, which follows the edges at the end of the file."""
    edges = max(xml.rfind(b"</edges>"), xml.rfind(b"<edges />"), xml.rfind(b"<edges/>"))
    start, end = xml.find(b"<rt_info>", edges + 1), xml.rfind(b"</rt_info>")
    if edges < 0 or start < 0 or end < start:
        return {}
    try:
        return _as_dict(ET.fromstring(xml[start : end + len(b"</rt_info>")]))
    except ET.ParseError:
        return {}


def _as_dict(element: ET.Element) -> dict[str, Any]:
    return {child.tag: _as_dict(child) if len(child) else child.get("value", "") for child in element}


# -- graph -------------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """An output of a layer: the layer's id and the port's id."""

    layer: str
    port: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant in the `.bin` file.

    Attributes:
        element_type: "f16", "i64", ...
        shape: length of each dimension; () for a scalar.
        offset: position in the `.bin`, in bytes. Constants with equal content share it.
        size: length in bytes.
    """

    element_type: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a graph.

    Attributes:
        id: its id, unique within the graph.
        type: the operation: "MatMul", "Const", "Parameter", ...
        name: its friendly name.
        inputs: the output that feeds each input port, in the order of the ports.
        outputs: its outputs, in their order.
        constant: the value's place in the `.bin`, if `type` is "Const".
    """

    id: str
    type: str
    name: str
    inputs: tuple[Output, ...]
    outputs: tuple[Output, ...]
    constant: Constant | None


class Edge:
    """A connection from an output of one layer to an input of another; `IrGraph.redirect` changes its source."""

    def __init__(self, element: ET.Element) -> None:
        self._element = element

    @property
    def source(self) -> Output:
        """The output that the edge starts from."""
        return Output(self._element.get("from-layer", ""), self._element.get("from-port", ""))

    def set_source(self, output: Output) -> None:
        """Change the XML only; see `IrGraph.redirect`."""
        self._element.set("from-layer", output.layer)
        self._element.set("from-port", output.port)

    @property
    def reader(self) -> str:
        """The id of the layer that the edge ends in."""
        return self._element.get("to-layer", "")


class IrGraph:
    """Layers and edges of an IR, read from its `.xml` file.

    Layer objects show the graph as it is when they are taken from it; edits do not change them.
    """

    def __init__(self, xml: Path, root: ET.Element) -> None:
        layers, edges = root.find("layers"), root.find("edges")
        if layers is None or edges is None:
            raise ModelError(f"{xml} is not an OpenVINO model: it has no {'edges' if edges is None else 'layers'}.")
        self._xml = xml
        self._root = root
        self._layers, self._edges = layers, edges
        self._by_id = {layer.get("id", ""): layer for layer in layers}
        self._sources: dict[tuple[str, str], Edge] = {}
        self._readers: dict[str, list[Edge]] = defaultdict(list)
        for element in edges:
            self._index(element)

    @classmethod
    def read(cls, xml: Path) -> IrGraph:
        """Parse an `.xml` file.

        Raises:
            ModelError: the file cannot be read, or is not an IR.
        """
        try:
            return cls(xml, ET.parse(xml).getroot())
        except (OSError, ET.ParseError) as error:
            raise ModelError(f"{xml} cannot be read: {error}.") from error

    def layers(self, type: str | None = None) -> Iterator[Layer]:  # noqa: A002 - the name of the attribute in the file
        """All layers in the order of the file, or those of one type."""
        for element in self._layers:
            if type is None or element.get("type") == type:
                yield self._layer(element)

    def layer(self, id: str) -> Layer:  # noqa: A002
        """The layer with an id.

        Raises:
            ModelError: there is none.
        """
        if id not in self._by_id:
            raise ModelError(f"{self._xml} is damaged: it has an edge to layer {id!r}, which does not exist.")
        return self._layer(self._by_id[id])

    def parameter(self, name: str) -> Layer | None:
        """The model input with a name, or None."""
        return next((layer for layer in self.layers("Parameter") if layer.name == name), None)

    def edges_from(self, layer: str) -> list[Edge]:
        """The edges that start from a layer."""
        return list(self._readers[layer])

    def int64(self, output: Output) -> int | None:
        """The value of an output that is a constant of one int64; None for any other output.

        Raises:
            OSError: the `.bin` file cannot be read.
        """
        constant = self.layer(output.layer).constant
        if constant is None or constant.element_type != "i64" or constant.size != 8:
            return None
        with self._xml.with_suffix(".bin").open("rb") as file:
            file.seek(constant.offset)
            return int.from_bytes(file.read(8), "little", signed=True)

    def constant_bytes(self, output: Output) -> bytes:
        """The data of an output that is a constant; b"" for any other output.

        Raises:
            OSError: the `.bin` file cannot be read.
        """
        constant = self.layer(output.layer).constant
        if constant is None:
            return b""
        with self._xml.with_suffix(".bin").open("rb") as file:
            file.seek(constant.offset)
            return file.read(constant.size)

    # -- editing -----------------------------------------------------------------------------------------------------

    def add(self, type: str, precision: str, *inputs: Output, rank: int, **data: str) -> Output:  # noqa: A002
        """Append a layer of opset1 with one output, and the edges to it; returns its output.

        Args:
            type: the operation.
            precision: precision of the output, as in the XML: "I64", "BOOL", ...
            inputs: the outputs that feed it.
            rank: number of dimensions of the output; their lengths stay unknown.
            data: attributes of the operation, such as `auto_broadcast="numpy"`.

        Raises:
            ModelError: an input does not exist.
        """
        key = str(1 + max(int(id_) for id_ in self._by_id))
        layer = ET.SubElement(self._layers, "layer", id=key, name=f"ov_phi3/{type}_{key}", type=type, version="opset1")
        if data:
            ET.SubElement(layer, "data", data)
        ports = ET.SubElement(layer, "input")
        for index, source in enumerate(inputs):
            ports.append(self._input_port(str(index), source))
            edge = {"from-layer": source.layer, "from-port": source.port, "to-layer": key, "to-port": str(index)}
            self._index(ET.SubElement(self._edges, "edge", edge))
        output = ET.SubElement(ET.SubElement(layer, "output"), "port", id=str(len(inputs)), precision=precision)
        for _ in range(rank):
            ET.SubElement(output, "dim").text = "-1"
        self._by_id[key] = layer
        return Output(key, str(len(inputs)))

    def redirect(self, edges: Iterable[Edge], output: Output) -> None:
        """Let edges start from another output."""
        for edge in edges:
            self._readers[edge.source.layer].remove(edge)
            edge.set_source(output)
            self._readers[output.layer].append(edge)

    def to_xml(self) -> str:
        """The text of the `.xml` file."""
        return ET.tostring(self._root, encoding="unicode")

    # -- elements ----------------------------------------------------------------------------------------------------

    def _index(self, element: ET.Element) -> None:
        edge = Edge(element)
        self._sources[edge.reader, element.get("to-port", "")] = edge
        self._readers[edge.source.layer].append(edge)

    def _layer(self, element: ET.Element) -> Layer:
        key, kind = element.get("id", ""), element.get("type", "")
        inputs = tuple(self._source(key, port.get("id", "")) for port in element.iterfind("input/port"))
        outputs = tuple(Output(key, port.get("id", "")) for port in element.iterfind("output/port"))
        data = element.find("data")
        constant = self._constant(data) if kind == "Const" and data is not None else None
        return Layer(key, kind, element.get("name", ""), inputs, outputs, constant)

    def _source(self, layer: str, port: str) -> Output:
        edge = self._sources.get((layer, port))
        if edge is None:
            raise ModelError(f"{self._xml} is damaged: input {port} of layer {layer} has no edge.")
        return edge.source

    def _constant(self, data: ET.Element) -> Constant:
        try:
            shape = tuple(int(length) for length in data.get("shape", "").split(",") if length.strip())
            offset, size = int(data.get("offset", "0")), int(data.get("size", "0"))
        except ValueError as error:
            raise ModelError(f"{self._xml} is damaged: {error} in the data of a constant.") from error
        return Constant(data.get("element_type", ""), shape, offset, size)

    def _input_port(self, port: str, source: Output) -> ET.Element:
        """An input port with the precision and shape of the output that feeds it."""
        layer = self._by_id.get(source.layer)
        for output in () if layer is None else layer.iterfind("output/port"):
            if output.get("id") == source.port:
                element = ET.Element("port", id=port, precision=output.get("precision", ""))
                for dim in output.iterfind("dim"):
                    ET.SubElement(element, "dim").text = dim.text
                return element
        raise ModelError(f"{self._xml} is damaged: layer {source.layer} has no output {source.port}.")
