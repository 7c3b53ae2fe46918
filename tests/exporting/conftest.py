"""Models to export, one real export, and a replacement for optimum-cli."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_models import CONFIG, write_json, write_safetensors

from ov_phi3.exporting import exporter, job
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.exporter import export

VERIFIED = 'ov_phi3-verified: ["played"]'


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A directory that passes for a Hugging Face model as long as nothing loads it."""
    directory = tmp_path / "hf"
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "tokenizer.json", {"added_tokens": []})
    write_safetensors(directory / "model.safetensors", {"a": 5, "b": 7})
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 with a byte-level tokenizer, in a directory with spaces and Chinese characters in its name."""
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
    """A real export, shared by the tests of a module."""
    output = tmp_path_factory.mktemp("real") / "a new folder" / "int4"
    lines: list[ProgressLine] = []
    assert export(tiny, output, progress=lines.append).path == output
    return output, lines


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that replaces optimum-cli by Python code; `OUT` in the code is the output directory."""

    def play(code: str, *, verify: str | None = "") -> None:
        monkeypatch.setattr(
            job, "OPTIMUM_CLI", "import shutil\nfrom pathlib import Path\nOUT = Path(sys.argv[-1])\n" + code
        )
        monkeypatch.setattr(exporter, "check_installed", lambda *args, **kwargs: None)
        if verify is not None:
            monkeypatch.setattr(job, "VERIFY", f"print({VERIFIED!r})\n" + verify)

    return play
