"""Graphs of OpenVINO IR files: layers, edges, constants, and edits."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_phi3.errors import ModelError
from ov_phi3.model.ir import Constant, IrGraph, Output

NET = """<?xml version="1.0"?>
<net name="Model0" version="11"><layers>
<layer id="0" name="ids" type="Parameter" version="opset1"><data shape="?,?" element_type="i64" />
<output><port id="0" precision="I64" names="ids"><dim>-1</dim><dim>-1</dim></port></output></layer>
<layer id="1" name="one" type="Const" version="opset1"><data element_type="i64" shape="" offset="8" size="8" />
<output><port id="0" precision="I64" /></output></layer>
<layer id="2" name="sum" type="Add" version="opset1">
<input><port id="0" precision="I64"><dim>-1</dim><dim>-1</dim></port><port id="1" precision="I64" /></input>
<output><port id="2" precision="I64"><dim>-1</dim><dim>-1</dim></port></output></layer>
<layer id="7" name="end" type="Result" version="opset1">
<input><port id="0" precision="I64"><dim>-1</dim><dim>-1</dim></port></input></layer>
</layers><edges>
<edge from-layer="0" from-port="0" to-layer="2" to-port="0" />
<edge from-layer="1" from-port="0" to-layer="2" to-port="1" />
<edge from-layer="2" from-port="2" to-layer="7" to-port="0" />
</edges></net>
"""


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    path = tmp_path / "model.xml"
    path.write_text(NET, encoding="utf-8")
    path.with_suffix(".bin").write_bytes(bytes(8) + (-5).to_bytes(8, "little", signed=True))
    return path


def test_layers_with_their_inputs_outputs_and_constants(xml: Path) -> None:
    graph = IrGraph.read(xml)
    assert [layer.type for layer in graph.layers()] == ["Parameter", "Const", "Add", "Result"]
    (add,) = graph.layers("Add")
    assert (add.id, add.name, add.constant) == ("2", "sum", None)
    assert add.inputs == (Output("0", "0"), Output("1", "0"))
    assert add.outputs == (Output("2", "2"),)
    assert graph.layer("1").constant == Constant("i64", (), 8, 8)
    parameter = graph.parameter("ids")
    assert parameter is not None
    assert parameter.id == "0"
    assert graph.parameter("sum") is None
    assert [edge.reader for edge in graph.edges_from("0")] == ["2"]


def test_only_a_constant_of_one_int64_has_a_value(xml: Path) -> None:
    graph = IrGraph.read(xml)
    assert graph.int64(Output("1", "0")) == -5
    assert graph.int64(Output("2", "2")) is None


def test_an_added_layer_takes_the_readers_of_another(xml: Path) -> None:
    graph = IrGraph.read(xml)
    readers = graph.edges_from("2")
    product = graph.add("Multiply", "I64", Output("2", "2"), Output("1", "0"), rank=2, auto_broadcast="numpy")
    graph.redirect(readers, product)
    assert product == Output("8", "2")
    assert graph.layer("7").inputs == (product,)
    assert graph.layer("8").inputs == (Output("2", "2"), Output("1", "0"))
    assert [edge.reader for edge in graph.edges_from("2")] == ["8"]
    assert [edge.reader for edge in graph.edges_from("8")] == ["7"]


def test_openvino_computes_the_edited_graph(xml: Path) -> None:
    import numpy as np
    import openvino

    graph = IrGraph.read(xml)
    readers = graph.edges_from("2")
    graph.redirect(readers, graph.add("Multiply", "I64", Output("2", "2"), Output("1", "0"), rank=2))
    weights = openvino.Tensor(np.frombuffer(xml.with_suffix(".bin").read_bytes(), np.uint8))
    core = openvino.Core()
    request = core.compile_model(core.read_model(graph.to_xml().encode(), weights), "CPU").create_infer_request()
    assert next(iter(request.infer([np.array([[7, 8]])]).values())).tolist() == [[-10, -15]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</net>", "", "cannot be read"),
        ("layers>", "layer-list>", "it has no layers"),
        ("edges>", "edge-list>", "it has no edges"),
        ('<edge from-layer="1" from-port="0" to-layer="2" to-port="1" />', "", "input 1 of layer 2 has no edge"),
        ('shape="" offset="8"', 'shape="" offset="x"', "in the data of a constant"),
    ],
)
def test_a_damaged_file_is_a_model_error(xml: Path, old: str, new: str, message: str) -> None:
    xml.write_text(NET.replace(old, new), encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        list(IrGraph.read(xml).layers())
    assert str(xml) in str(caught.value)


def test_a_missing_layer_or_output_is_a_model_error(xml: Path) -> None:
    graph = IrGraph.read(xml)
    with pytest.raises(ModelError, match="layer '9', which does not exist"):
        graph.layer("9")
    with pytest.raises(ModelError, match="layer 2 has no output 5"):
        graph.add("Abs", "I64", Output("2", "5"), rank=2)
