"""`export(adapter=...)`: the merged model, the adapter at load and peft give the same ids; what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openvino
import pytest
from exporter import needs_exporter
from hf_models import CONFIG, copying, nothing_left, write_json
from lora import lora_tensors, write_adapter

import ov_phi3
from ov_phi3.backends.paged.lora import LINEAR, input_factors
from ov_phi3.errors import ExportError, ModelError
from ov_phi3.exporting import exporter, job
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.exporter import export

PROMPT = list(range(20, 30))
NEW = 24


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors")
    return write_adapter(tmp_path_factory.mktemp("lora") / "my lora", lora_tensors(CONFIG, strength=0.2))


def peft_ids(source: Path, adapter: Path) -> list[int]:
    """Greedy ids of peft, which changes the layers and not the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def greedy(model: Path, **options: Any) -> list[int]:
    with ov_phi3.load(model, "CPU", **options) as pipe:
        return list(pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False, ignore_eos=True).token_ids)


@needs_exporter
def test_merged_at_load_and_in_peft_are_the_same(tiny: Path, lora: Path, tmp_path: Path) -> None:
    reference = peft_ids(tiny, lora)
    lines: list[ProgressLine] = []
    plain = export(tiny, tmp_path / "plain", "fp32")
    merged = export(tiny, tmp_path / "merged", "fp32", adapter=lora, progress=lines.append)
    assert greedy(merged.path) == greedy(merged.path, backend="infer_request") == reference
    assert greedy(plain.path, adapters=lora) == reference
    assert greedy(plain.path, adapters=lora, backend="infer_request") == reference
    assert greedy(plain.path) != reference
    assert merged.manifest is not None
    recorded = merged.manifest["adapter"]
    assert (recorded["path"], recorded["rank"], recorded["scale"]) == (str(lora), 4, 3.0)
    assert merged.manifest["source"] == str(tiny)
    assert any(line.ours and "Merging" in line for line in lines)
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (merged.path / name).read_bytes() == (plain.path / name).read_bytes()
    nothing_left(tmp_path, "plain", "merged")


@needs_exporter
def test_awq_scales_the_inputs_of_layers_with_adapters(tiny: Path, lora: Path, tmp_path: Path) -> None:
    """The real export has the nodes that the engine looks for; `test_lora.py` compares the numbers."""
    model = export(tiny, tmp_path / "awq", "int4", awq=True, group_size=16, ratio=1.0).path
    graph = openvino.Core().read_model(model / "openvino_model.xml")
    scaled = {
        match["module"].rpartition(".")[2]: input_factors(
            node, int(node.input_value(0).get_partial_shape()[2].get_length()), model
        )
        for node in graph.get_ops()
        if (match := LINEAR.fullmatch(node.get_friendly_name()))
    }
    assert {name for name, factors in scaled.items() if factors is not None} == {"down_proj"}
    with pytest.raises(ModelError, match="was exported with AWQ.*Take backend='infer_request', or merge"):
        ov_phi3.load(model, "CPU", adapters=lora)
    assert greedy(model, adapters=lora, backend="infer_request") != greedy(model, backend="infer_request")


@needs_exporter
def test_an_adapter_that_peft_does_not_apply_completely(tiny: Path, lora: Path, tmp_path: Path) -> None:
    """The file has tensors that the config does not name: peft alone would leave them out with a warning."""
    pytest.importorskip("peft")
    partial = tmp_path / "partial"
    shutil.copytree(lora, partial)
    config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(partial / "adapter_config.json", {**config, "target_modules": ["qkv_proj"]})
    with pytest.raises(ExportError, match=r"The adapter cannot be merged.*6 tensors are in the adapter or"):
        export(tiny, tmp_path / "out", "fp32", adapter=partial)
    nothing_left(tmp_path, "partial")


def test_the_merged_copy_is_what_optimum_gets(hf: Path, lora: Path, tmp_path: Path, played: Any, merged: Any) -> None:
    merged("print('MERGE', sys.argv[1:]); Path(sys.argv[3]).mkdir()")
    played("print('CONVERT', sys.argv[1:]); sys.exit('stopped here')")
    lines: list[ProgressLine] = []
    with pytest.raises(ExportError, match="stopped here"):
        export(hf, tmp_path / "out", adapter=str(lora), progress=lines.append, trust_remote_code=True)
    merge, convert = (next(line for line in lines if line.startswith(word)) for word in ("MERGE", "CONVERT"))
    assert merge.startswith(f"MERGE {[str(hf), str(lora)]!r}"[:-1])
    assert "--trust-remote-code" in merge
    assert "scratch/merged', '--task'" in convert
    nothing_left(tmp_path, "hf")


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that replaces the merge by Python code."""
    return lambda code: monkeypatch.setattr(job, "MERGE", f"from pathlib import Path\n{code}")


def test_adapters_that_do_not_fit_are_refused_before_anything_starts(
    hf: Path, lora: Path, tmp_path: Path, played: Any, merged: Any
) -> None:
    merged("raise SystemExit('started')")
    played("raise SystemExit('started')")
    wide = write_adapter(tmp_path / "wide", lora_tensors({**CONFIG, "hidden_size": 128}))
    deep = write_adapter(tmp_path / "deep", lora_tensors({**CONFIG, "num_hidden_layers": 2}))
    rank = write_adapter(tmp_path / "rank", lora_tensors(CONFIG), rank=8)
    for adapter, words in (
        (wide, r"has the shape .*this model needs"),
        (deep, "the model has 1 layers"),
        (rank, r"this model needs \[8, 192\]"),
        (hf, "has no adapter_config.json"),
        (lora / "adapter_model.safetensors", "is a file; expected the folder"),
        (tmp_path / "nothing", "does not exist"),
    ):
        with pytest.raises(ModelError, match=words):
            export(hf, tmp_path / "out", adapter=adapter)
    with pytest.raises(TypeError):
        export(hf, tmp_path / "out", adapter=3)  # type: ignore[arg-type]
    nothing_left(tmp_path, "hf", "wide", "deep", "rank")


@pytest.mark.parametrize("base", ["microsoft/Phi", "microsoft/Phi-4"])
def test_both_from_the_hub(
    tmp_path: Path, lora: Path, base: str, played: Any, merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real look-ups, with the files in the hub's cache."""
    pytest.importorskip("huggingface_hub")
    for name in ("microsoft--Phi", "me--my-lora"):
        snapshot = tmp_path / "cache" / f"models--{name}" / "snapshots" / ("c0ffee" * 7)[:40]
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
        write_json(snapshot / "config.json", CONFIG)
    shutil.copytree(lora, snapshot, dirs_exist_ok=True)
    config = json.loads((snapshot / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(snapshot / "adapter_config.json", {**config, "base_model_name_or_path": base})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    merged("sys.exit(repr(sys.argv[1:]))")
    played("raise SystemExit('started')")
    fits = base == "microsoft/Phi"
    error, words = (ExportError, r"'--cache-dir'") if fits else (ModelError, "was trained on 'microsoft/Phi-4'")
    with pytest.raises(error, match=words):
        export("microsoft/Phi", tmp_path / "out", adapter="me/my-lora", cache_dir=str(tmp_path / "cache"))


def test_the_merge_needs_peft(hf: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.versions, "package_version", lambda name: None if name == "peft" else "1")
    with pytest.raises(ExportError, match=r"needs peft, not installed here. Fix: pip install .*peft>="):
        export(hf, tmp_path / "out", adapter=lora)


@needs_exporter
def test_models_that_differ_by_their_adapter_have_other_fingerprints(
    exported: tuple[Path, list[ProgressLine]], hf: Path, lora: Path, tmp_path: Path, played: Any, merged: Any
) -> None:
    """The same weights at all sampled places: the manifest tells them apart, and with it saved KV caches."""
    merged("")
    played(copying(exported[0]))
    other = write_adapter(tmp_path / "other", lora_tensors(CONFIG, seed=1))
    names = [export(hf, tmp_path / str(i), adapter=lora).fingerprint for i, lora in enumerate([lora, other, lora])]
    assert names[0] == names[2] != names[1]
    assert export(hf, tmp_path / "plain").fingerprint not in names
