"""`ov_phi3.export`: one real export, and optimum-cli played by a few lines of Python where it has to fail."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exporter import needs_exporter

from ov_phi3.errors import ConfigError, ExportError, ModelError
from ov_phi3.exporting import child, source, workspace
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.flags import FLAGS, RECIPES, REFUSED, arguments, combine
from ov_phi3.model.config import Phi3Config
from ov_phi3.model.files import UNFINISHED
from ov_phi3.model.info import MANIFEST, ModelInfo
from ov_phi3.system.memory import Memory

module = importlib.import_module("ov_phi3.exporting.exporter")
export = module.export

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 264,
}


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, int]) -> None:
    """A file with float16 tensors of so many values each, all zero."""
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "F16", "shape": [size], "data_offsets": [offset, offset + 2 * size]}
        offset += 2 * size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """What looks like a Hugging Face model until it is loaded."""
    directory = tmp_path / "hf"
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "tokenizer.json", {"added_tokens": []})
    write_safetensors(directory / "model.safetensors", {"a": 5, "b": 7})
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 with a byte-level tokenizer, in a directory whose name needs care."""
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    safetensors = pytest.importorskip("safetensors.torch")
    directory = tmp_path_factory.mktemp("tiny") / "Phi 3 – 模型"
    directory.mkdir()
    control = ["<|endoftext|>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate([*control, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": control[0],
            "bos_token": "<s>",
            "pad_token": control[0],
        },
    )
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    write_json(directory / "config.json", {**CONFIG, "dtype": "float32"})
    write_json(directory / "generation_config.json", {"eos_token_id": [0, 2]})
    shapes = {
        "model.embed_tokens.weight": (264, 96),
        "model.norm.weight": (96,),
        "lm_head.weight": (264, 96),
        "model.layers.0.input_layernorm.weight": (96,),
        "model.layers.0.post_attention_layernorm.weight": (96,),
        "model.layers.0.self_attn.qkv_proj.weight": (192, 96),
        "model.layers.0.self_attn.o_proj.weight": (96, 96),
        "model.layers.0.mlp.gate_up_proj.weight": (384, 96),
        "model.layers.0.mlp.down_proj.weight": (96, 192),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    safetensors.save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ProgressLine]]:
    """The one real export that these tests share."""
    output = tmp_path_factory.mktemp("real") / "a new folder" / "int4"
    lines: list[ProgressLine] = []
    assert export(tiny, output, progress=lines.append).path == output
    return output, lines


# -- a real export -----------------------------------------------------------------------------------------------------


@needs_exporter
def test_real_export(exported: tuple[Path, list[ProgressLine]], tiny: Path) -> None:
    output, lines = exported
    info = ModelInfo.from_dir(output)
    assert info.quantization == "int4_sym, group size 128, ratio 0.6"
    assert (info.family, info.eos_token_ids, info.warnings) == ("phi3-compatible", (0, 2), ())
    assert [path.name for path in output.parent.iterdir()] == ["int4"]
    manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    assert manifest == info.manifest
    assert (manifest["format"], manifest["source"], manifest["recipe"]) == (1, str(tiny), "int4")
    assert manifest["flags"]["group_size_fallback"] == "adjust"
    assert "hidden_size = 96" in manifest["group_size"]["reason"]
    assert manifest["verified"] == ["read_model", "tokenizer", "inference"]
    assert manifest["versions"].keys() >= {"ov_phi3", "optimum-intel", "nncf", "transformers", "openvino", "torch"}
    assert manifest["files"] == {p.name: p.stat().st_size for p in sorted(output.iterdir()) if p.name != MANIFEST}
    digest = hashlib.sha256((output / "openvino_tokenizer.xml").read_bytes()).hexdigest()
    assert manifest["sha256"]["openvino_tokenizer.xml"] == digest
    assert any(line.ours and "--task text-generation-with-past" in line for line in lines)
    assert any(not line.ours for line in lines)


@needs_exporter
def test_nothing_heavy_is_imported() -> None:
    code = (
        "import importlib, sys; importlib.import_module('ov_phi3.exporting.exporter')\n"
        "print({'torch', 'transformers', 'optimum', 'nncf', 'numpy', 'openvino'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@needs_exporter
def test_flags_are_those_of_optimum_cli() -> None:
    command = [sys.executable, "-c", module._OPTIMUM_CLI, "export", "openvino", "--help"]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
    ).stdout
    real = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text.partition("options:")[0]))
    real -= {"model", "task", "trust-remote-code"}
    real |= {option for option in ("disable-stateful",) if option in text}
    ours = {(flag.option or "--" + name.replace("_", "-"))[2:] for name, flag in FLAGS.items()}
    assert ours == real - {name.replace("_", "-") for name in REFUSED}
    for name, flag in FLAGS.items():
        choices = re.search(rf"--{name.replace('_', '.')} {{([^}}]*)}}", text)
        if choices and name != "library":
            assert flag.choices == tuple(choices[1].split(",")), name


# -- optimum-cli, played -----------------------------------------------------------------------------------------------


PLAYED = 'ov_phi3-verified: ["played"]'


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts Python code in optimum-cli's place; `OUT` is its output directory."""

    def play(code: str, *, verify: str | None = "") -> None:
        monkeypatch.setattr(
            module, "_OPTIMUM_CLI", "import shutil\nfrom pathlib import Path\nOUT = Path(sys.argv[-1])\n" + code
        )
        monkeypatch.setattr(module, "_check_installed", lambda flags: None)
        if verify is not None:
            monkeypatch.setattr(module, "_VERIFY", f"print({PLAYED!r})\n" + verify)

    return play


def copying(directory: Path, *without: str) -> str:
    return f"shutil.copytree({str(directory)!r}, OUT, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*{without!r}))"


def nothing_left(parent: Path, *expected: str) -> None:
    assert sorted(path.name for path in parent.iterdir()) == sorted(expected)


def test_failure_keeps_the_reason(hf: Path, tmp_path: Path, played: Any) -> None:
    played("(OUT / 'openvino_model.xml').touch(); print('noise'); sys.exit('OSError: No space left on device')")
    with pytest.raises(ExportError) as caught:
        export(hf, tmp_path / "out")
    first, *rest = str(caught.value).splitlines()
    assert first == "optimum-cli failed (exit code 1): OSError: No space left on device The disk is full."
    assert rest == ["  | noise", "  | OSError: No space left on device"]
    nothing_left(tmp_path, "hf")


def test_killed_for_memory(hf: Path, tmp_path: Path, played: Any) -> None:
    played("os.kill(os.getpid(), 9)")
    with pytest.raises(ExportError, match="it was killed Most likely memory ran out"):
        export(hf, tmp_path / "out")


def test_success_without_a_model(hf: Path, tmp_path: Path, played: Any) -> None:
    played("print('all fine')")
    with pytest.raises(ExportError, match="wrote no model"):
        export(hf, tmp_path / "out")


@needs_exporter
def test_missing_tokenizer_is_converted(
    tiny: Path, exported: tuple[Path, list[ProgressLine]], tmp_path: Path, played: Any
) -> None:
    played(copying(exported[0], "*tokenizer.xml", "*tokenizer.bin"), verify=None)
    lines: list[ProgressLine] = []
    info = export(tiny, tmp_path / "out", progress=lines.append)
    assert info.manifest is not None
    assert "tokenizer" in info.manifest["verified"]
    assert any("convert_tokenizer" in line for line in lines)


def test_tokenizer_that_cannot_be_converted(
    hf: Path, tmp_path: Path, played: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    played("(OUT / 'openvino_model.xml').touch()")
    monkeypatch.setattr(module, "_CONVERT_TOKENIZER", "sys.exit('no fast tokenizer')")
    with pytest.raises(ExportError, match=r"its tokenizer cannot be converted.*no fast tokenizer"):
        export(hf, tmp_path / "out")
    nothing_left(tmp_path, "hf")


def test_other_files_left_out(hf: Path, tmp_path: Path, played: Any) -> None:
    names = ("openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json")
    played(f"[(OUT / name).write_text('x') for name in {names}]")
    with pytest.raises(ExportError, match=r"openvino_model.bin is missing"):
        export(hf, tmp_path / "out")


@needs_exporter
def test_result_that_does_not_load(
    exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any
) -> None:
    played(copying(exported[0]) + "\n(OUT / 'openvino_model.bin').write_bytes(b'x')", verify=None)
    with pytest.raises(ExportError, match="its result does not load"):
        export(hf, tmp_path / "out")
    nothing_left(tmp_path, "hf")


@needs_exporter
def test_temporary_files_stay_in_the_workspace(
    exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any
) -> None:
    played(
        copying(exported[0])
        + "\nimport tempfile; print('TMP', tempfile.mkdtemp())"
        + "\nprint('ENV', os.environ['HF_HUB_DISABLE_TELEMETRY'], sys.path.count(''), sys.argv[1:-1])"
    )
    lines: list[ProgressLine] = []
    export(hf, tmp_path / "out", "fp16", progress=lines.append, trust_remote_code=True)
    (scratch,) = [Path(line[4:]) for line in lines if line.startswith("TMP ")]
    assert scratch.is_relative_to(tmp_path)
    assert not scratch.exists()
    (line,) = [line for line in lines if line.startswith("ENV ")]
    expected = ["export", "openvino", "--model", str(hf), "--task", "text-generation-with-past"]
    assert line == f"ENV 1 0 {[*expected, '--trust-remote-code', '--weight-format', 'fp16']}"
    assert any(line.ours and "Phi-3 models need none" in line for line in lines)
    nothing_left(tmp_path, "hf", "out")


@needs_exporter
def test_overwrite(exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any) -> None:
    played(copying(exported[0]))
    out = tmp_path / "out"
    out.mkdir()
    export(hf, out)  # an empty directory is taken
    (out / "mine.txt").touch()
    with pytest.raises(ExportError, match="not empty; pass overwrite=True"):
        export(hf, out)
    played("sys.exit(3)")
    with pytest.raises(ExportError):
        export(hf, out, overwrite=True)
    assert ModelInfo.from_dir(out)
    assert (out / "mine.txt").exists()
    played(copying(exported[0]))
    export(hf, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    nothing_left(tmp_path, "hf", "out")


def test_outputs_that_are_refused(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: Any) -> None:
    played("")
    (tmp_path / "file").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").touch()
    for output, words in (
        ("file", "is a file"),
        ("home", "holds no model, but 'diary.txt'"),
        ("hf", "is, or contains, the source"),
        (".", "is, or contains, the source"),
        ("file/below", "cannot be"),
    ):
        with pytest.raises(ExportError, match=words):
            export(hf, tmp_path / output, overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="current directory"):
        export(hf, ".")


def test_a_progress_callback_that_fails(hf: Path, tmp_path: Path, played: Any) -> None:
    played("print('one', flush=True); import threading; threading.Event().wait()")

    def progress(line: ProgressLine) -> None:
        if not line.ours:
            raise KeyError(line)

    with pytest.raises(KeyError, match="one"):
        export(hf, tmp_path / "out", progress=progress)
    nothing_left(tmp_path, "hf")


def test_exporter_not_installed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.versions, "package_version", lambda name: None if name in ("nncf", "torch") else "1")
    with pytest.raises(ExportError, match=r'torch, nncf, not installed here. Fix: pip install "ov-phi3\[export\]"'):
        export(hf, tmp_path / "out")
    with pytest.raises(ExportError, match="needs torch, not installed"):
        export(hf, tmp_path / "out", "fp16")


# -- killed exports ----------------------------------------------------------------------------------------------------

KILLABLE = """
import importlib, sys
module = importlib.import_module("ov_phi3.exporting.exporter")
module._check_installed = lambda flags: None
module._OPTIMUM_CLI = '''
import threading
from pathlib import Path
out = Path(sys.argv[-1])
for name in ("openvino_model.xml", "config.json"):
    (out / name).write_text("half")
alive = open({fifo!r}, "w")
print("half written", flush=True)
threading.Event().wait()
'''
module.export(sys.argv[1], sys.argv[2], progress=lambda line: print(line, flush=True))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_export_leaves_nothing(hf: Path, tmp_path: Path, how: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", KILLABLE.format(fifo=str(fifo)), str(hf), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with fifo.open() as alive:
                assert any(line == "half written\n" for line in process.stdout)
                (half,) = tmp_path.glob(".out.*/model")
                with pytest.raises(ModelError, match="has not finished"):
                    ModelInfo.from_dir(half)
                process.send_signal(getattr(signal, how))
                assert alive.read() == ""  # until the child has gone, which holds the other end
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0
    nothing_left(tmp_path, "hf", "fifo")


def test_abandoned_and_running_exports(tmp_path: Path) -> None:
    target = tmp_path / "o[u]t*"
    abandoned = tmp_path / f".{target.name}.ov_phi3-export-0123"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    other = tmp_path / ".other.ov_phi3-export-0123"
    other.mkdir()
    with workspace.Workspace(target) as running:
        assert not abandoned.exists()
        assert (running.model / UNFINISHED).exists()
        with pytest.raises(ExportError, match="Another export to"):
            workspace.Workspace(target)
        assert running.model.exists()
    nothing_left(tmp_path, other.name)


def test_a_rename_that_fails_puts_the_old_model_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").touch()
    with workspace.Workspace(target) as work:
        shutil.rmtree(work.model)
        with pytest.raises(ExportError, match="cannot be replaced"):
            work.install()
    assert (target / "config.json").exists()


# -- lines of progress -------------------------------------------------------------------------------------------------


def test_lines(tmp_path: Path) -> None:
    code = (
        r"""sys.stdout.buffer.write("a\r\nbar 1\rbar 2\r\x1b[32mgr\u00fcn\x1b[0m\n\n\xe9 last".encode()); sys.exit(7)"""
    )
    lines: list[ProgressLine] = []
    status, tail = child.run(child.bootstrap(code, tmp_path / "x"), child.child_environment(tmp_path), lines.append)
    assert status == 7
    assert [(str(line), line.transient) for line in lines] == [
        ("a", False),
        ("bar 1", True),
        ("bar 2", True),
        ("grün", False),
        ("é last", False),
    ]
    assert tail == ["a", "grün", "é last"]


def test_a_command_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be started"):
        child.run([str(tmp_path / "nothing")], {}, print)


# -- flags -------------------------------------------------------------------------------------------------------------


def test_recipes() -> None:
    cookbook = "--weight-format int4 --group-size 128 --ratio 0.6 --sym"
    assert " ".join(arguments(combine("int4", {}))) == cookbook
    assert " ".join(arguments(combine("int4-max", {}))) == cookbook.replace("0.6", "1.0")
    for name in ("int8", "fp16", "fp32"):
        assert arguments(combine(name, {})) == ["--weight-format", name]
    assert all(recipe.name == name and recipe.summary for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"group_size": 64, "awq": True}, "--weight-format int4 --group-size 64 --ratio 0.6 --sym --awq"),
        ({"sym": False}, "--weight-format int4 --group-size 128 --ratio 0.6"),
        ({"ratio": None, "group_size": -1}, "--weight-format int4 --group-size -1 --sym"),
        ({"weight_format": "int4"}, "--weight-format int4 --group-size 128 --ratio 0.6 --sym"),
        ({"weight_format": "nf4"}, "--weight-format nf4"),
        ({"ratio": 1, "cache_dir": "x y"}, "--weight-format int4 --group-size 128 --ratio 1 --sym --cache_dir x y"),
        ({"quant_mode": "int8", "dataset": "wikitext2"}, "--quant-mode int8 --dataset wikitext2"),
        ({"model_kwargs": {"a": 1}}, '--weight-format int4 --group-size 128 --ratio 0.6 --sym --model-kwargs {"a": 1}'),
    ],
)
def test_overrides(flags: dict[str, Any], expected: str) -> None:
    assert " ".join(arguments(combine("int4", flags))) == expected


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        ("int5", {}, "recipe is 'int5'; expected one of int4, int4-max, int8, fp16, fp32. Did you mean"),
        ("int4", {"groupsize": 64}, "'groupsize' is not a flag .* Did you mean 'group_size'"),
        ("int4", {"task": "text-generation"}, "task cannot be set"),
        ("int4", {"revision": "main"}, "revision cannot be set: .* download that revision"),
        ("int4", {"disable_stateful": True}, "disable_stateful cannot be set"),
        ("int4", {"weight_format": "int3"}, "weight_format is 'int3'; expected one of fp32"),
        ("int4", {"weight_format": None}, "weight_format is None"),
        ("int4", {"ratio": 0}, "ratio is 0"),
        ("int4", {"ratio": 1.5}, "ratio is 1.5"),
        ("int4", {"group_size": 0}, "group_size is 0"),
        ("int4", {"dataset": ""}, "dataset is empty"),
        ("int4", {"gptq": True}, "gptq needs a dataset"),
        ("int4", {"num_samples": 5}, "num_samples needs a dataset"),
        ("int4-max", {"dataset": "c4"}, "dataset has no effect"),
        ("int4", {"smooth_quant_alpha": 0.5}, "smooth_quant_alpha: no effect"),
        ("int8", {"group_size": 64, "ratio": 0.5}, "group_size, ratio: no effect with weight_format 'int8'"),
        ("fp16", {"sym": True}, "sym: no effect with weight_format 'fp16'"),
        ("int4", {"weight_format": "mxfp4", "group_size": 64}, "expected 32"),
        ("int4", {"quant_mode": "int8"}, "needs a dataset"),
        ("int4", {"quant_mode": "int8", "dataset": "c4", "ratio": 0.5}, "ratio: no effect with quant_mode 'int8'"),
        ("int4", {"quant_mode": "int8", "weight_format": "int4"}, "exclude each other"),
    ],
)
def test_flags_that_are_refused(recipe: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combine(recipe, flags)


@pytest.mark.parametrize(
    "flags",
    [{"group_size": "64"}, {"group_size": True}, {"ratio": "x"}, {"awq": 1}, {"dataset": 3}, {"model_kwargs": "{}"}],
)
def test_flags_of_a_wrong_type(flags: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(flags))} is .*; expected"):
        combine("int4", flags)


def test_nothing_starts_with_wrong_arguments(hf: Path, tmp_path: Path, played: Any) -> None:
    played("raise SystemExit('started')")
    with pytest.raises(ConfigError):
        export(hf, tmp_path / "out", group_sise=64)
    with pytest.raises(ConfigError, match="Nearest sizes that fit: 16, 32"):
        export(hf, tmp_path / "out", group_size=128)
    with pytest.raises(TypeError, match="trust_remote_code"):
        export(hf, tmp_path / "out", trust_remote_code="yes")
    nothing_left(tmp_path, "hf")


# -- the group size ----------------------------------------------------------------------------------------------------


def decide(tmp_path: Path, flags: dict[str, Any], *, explicit: bool = False, **config: int) -> Any:
    write_json(tmp_path / "config.json", {**CONFIG, **config})
    return module.decide_group_size(
        combine("int4", flags), Phi3Config.read(tmp_path / "config.json"), explicit=explicit
    )


PHI3_MINI = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}


def test_group_size_that_fits(tmp_path: Path) -> None:
    decision = decide(tmp_path, {}, **PHI3_MINI)
    assert (decision["adjusted"], decision["reason"]) == (False, "128 divides 3072, 3072, 8192.")


def test_group_size_of_the_recipe_is_adjusted(tmp_path: Path) -> None:
    decision = decide(
        tmp_path, {}, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    )
    assert decision["adjusted"]
    assert "128 does not divide hidden_size = 576" in decision["reason"]


def test_group_size_of_the_caller(tmp_path: Path) -> None:
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    with pytest.raises(ConfigError, match=r"hidden_size = 576.* Nearest sizes that fit: 16, 32, 64; or -1"):
        decide(tmp_path, {"group_size": 128}, explicit=True, **sizes)
    with pytest.raises(ConfigError):
        decide(tmp_path, {"group_size_fallback": "error"}, **sizes)
    asked = decide(tmp_path, {"group_size": 128, "group_size_fallback": "ignore"}, explicit=True, **sizes)
    assert (asked["adjusted"], "was asked for" in asked["reason"]) == (False, True)
    assert not decide(tmp_path, {"group_size": 64}, explicit=True, **sizes)["adjusted"]


def test_heads_wider_than_the_model(tmp_path: Path) -> None:
    decision = decide(tmp_path, {}, **{**PHI3_MINI, "head_dim": 100})
    assert "num_attention_heads x head_dim = 3200" not in decision["reason"]
    assert "num_attention_heads x head_dim = 3232" in decide(tmp_path, {}, **{**PHI3_MINI, "head_dim": 101})["reason"]


@pytest.mark.parametrize("flags", [{"group_size": -1}, {"weight_format": "int8"}, {"weight_format": "cb4"}])
def test_no_groups(tmp_path: Path, flags: dict[str, Any]) -> None:
    assert decide(tmp_path, flags) is None


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["microsoft/Phi-3-mini-4k-instruct", "a/b.c_d-e"])
def test_hub_names(name: str) -> None:
    found = source.find_source(name)
    assert (found.name, found.local, found.config) == (name, False, None)


@pytest.mark.parametrize(
    "name", ["phi-3", "./a/b", "/a/b", "a/b/c", "a//b", "../b", "a/..", "a b/c", "", "~/a/b", "a\\b"]
)
def test_neither_directory_nor_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        source.find_source(name)


def test_a_path_is_never_a_hub_name() -> None:
    with pytest.raises(ModelError, match="neither a directory nor a hub name"):
        source.find_source(Path("microsoft/Phi-3-mini-4k-instruct"))


def test_good_source(hf: Path) -> None:
    found = source.local_source(hf)
    assert (found.parameters, found.weight_bytes) == (12, (hf / "model.safetensors").stat().st_size)


def broken(hf: Path, how: str) -> Path:
    """The directory `hf`, broken."""
    weights = hf / "model.safetensors"
    actions = {
        "no config": lambda: (hf / "config.json").unlink(),
        "llama": lambda: write_json(hf / "config.json", {**CONFIG, "model_type": "llama"}),
        "no weights": weights.unlink,
        "exported": lambda: (weights.unlink(), (hf / "openvino_model.xml").touch()),
        "no tokenizer": lambda: (hf / "tokenizer.json").unlink(),
        "cut off": lambda: weights.write_bytes(weights.read_bytes()[:-1]),
        "cut off early": lambda: weights.write_bytes(b"abc"),
        "pointer": lambda: weights.write_text("version https://git-lfs.github.com/spec/v1"),
        "not safetensors": lambda: weights.write_bytes(struct.pack("<Q", 2) + b"xx" * 50),
        "shard": lambda: write_json(hf / "model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}}),
    }
    actions[how]()
    return hf


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "has no config.json"),
        ("llama", "model_type is 'llama'"),
        ("no weights", "has no weights"),
        ("exported", "is exported already"),
        ("no tokenizer", "has no tokenizer"),
        ("cut off", "is cut off"),
        ("cut off early", "is (cut off|not a safetensors file)"),
        ("pointer", "Git LFS pointer"),
        ("not safetensors", "not a safetensors file"),
        ("shard", "lacks model-2.safetensors"),
    ],
)
def test_bad_sources(hf: Path, tmp_path: Path, how: str, words: str, played: Any) -> None:
    played("raise SystemExit('started')")
    with pytest.raises(ModelError, match=words):
        export(broken(hf, how), tmp_path / "out")
    nothing_left(tmp_path, "hf")


def test_source_is_a_file(hf: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        source.find_source(hf / "config.json")


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_hub_config_comes_first(tmp_path: Path, model_type: str, played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real look-up, in a cache that holds the file already."""
    pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "cache" / "models--microsoft--Phi" / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.mkdir(parents=True)
    write_json(snapshot / "config.json", {**CONFIG, "model_type": model_type})
    refs = tmp_path / "cache" / "models--microsoft--Phi" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    played("print(sys.argv); sys.exit('stopped here')")
    error, words = (ExportError, "stopped here") if model_type == "phi3" else (ModelError, "model_type is 'llama'")
    lines: list[ProgressLine] = []
    with pytest.raises(error, match=words):
        export("microsoft/Phi", tmp_path / "out", progress=lines.append, cache_dir=str(tmp_path / "cache"))
    if model_type == "phi3":
        assert any("'--model', 'microsoft/Phi'" in line and "'adjust'" in line for line in lines)
    assert source.hub_revision(snapshot / "config.json") == snapshot.name


def test_hub_out_of_reach(tmp_path: Path, played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    played("raise SystemExit('started')")
    with pytest.raises(ExportError, match=r"config.json of 'microsoft/Phi' cannot be fetched.*hub cannot be reached"):
        export("microsoft/Phi", tmp_path / "out", cache_dir=str(tmp_path))


# -- room --------------------------------------------------------------------------------------------------------------

GIB = 2**30


def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, disk: float, total: float, free: float) -> str | None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=int(disk * GIB)))
    memory = Memory(int(total * GIB), int(free * GIB), int(total * GIB), int(free * GIB))
    monkeypatch.setattr(source, "machine_memory", lambda: memory)
    model = source.Source("x", local=True, weight_bytes=8 * GIB, parameters=4 * GIB)
    return source.check_space(model, {"weight_format": "int4"}, tmp_path)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(tmp_path, monkeypatch, disk=20, total=32, free=16) is None
    assert "may be slow, or be killed" in str(room(tmp_path, monkeypatch, disk=20, total=32, free=8))
    with pytest.raises(
        ExportError, match=r"10.0 GiB free; the export needs about 11.2 GiB .* \(3.2 GiB for its result\)"
    ):
        room(tmp_path, monkeypatch, disk=10, total=32, free=16)
    with pytest.raises(ExportError, match=r"has 8.0 GiB of memory; the export needs about 12.0 GiB"):
        room(tmp_path, monkeypatch, disk=20, total=8, free=8)


def test_room_without_known_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source.Source("x", local=True, weight_bytes=8 * GIB, parameters=4 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=20 * GIB))
    for memory in (None, Memory(GIB, GIB)):
        monkeypatch.setattr(source, "machine_memory", lambda memory=memory: memory)
        assert source.check_space(model, {"weight_format": "int4"}, tmp_path) is None
