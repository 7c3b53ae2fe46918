"""The GGUF file of a random Phi-3: the weights of its source, and a file that llama.cpp opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import phi3_gguf
import pytest

from _models import GGUF_TYPES, model_command, parse_model
from _paths import cache_dir
from _steps import BootstrapError

LLAMA_PYTHON = cache_dir() / "peers" / "llama-cpp" / "bin" / "python"


@pytest.fixture(scope="module")
def written(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "tiny"
    return phi3_gguf.build(tiny_hf, out, "f16", cache_dir() / "downloads") / phi3_gguf.FILE


def test_every_weight_is_that_of_the_source(written: Path, tiny_hf: Path):
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    source: dict[str, Any] = {}
    for path in tiny_hf.glob("*.safetensors"):
        source |= load_file(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert len(stored) == len(source) == 2 * 6 + 3
    for name, value in source.items():
        tensor = stored[phi3_gguf.gguf_name(name)]
        assert list(tensor.shape) == list(value.shape)[::-1]  # GGUF counts the fastest dimension first
        kind = np.float16 if value.ndim > 1 else np.float32
        assert np.array_equal(tensor.data.reshape(value.shape), value.astype(kind)), name


def test_sizes_and_vocabulary_are_those_of_phi_3(written: Path, tiny_hf: Path):
    gguf = pytest.importorskip("gguf")
    config = json.loads((tiny_hf / "config.json").read_text(encoding="utf-8"))
    reader = gguf.GGUFReader(written)

    def value(name: str) -> Any:
        return reader.get_field(name).contents()

    assert value("general.architecture") == "phi3"
    assert value("phi3.block_count") == config["num_hidden_layers"]
    assert value("phi3.embedding_length") == config["hidden_size"]
    assert value("phi3.attention.head_count_kv") == config["num_key_value_heads"]
    assert value("phi3.rope.dimension_count") == config["hidden_size"] // config["num_attention_heads"]
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == config["vocab_size"]
    assert (tokens[1], tokens[32000], tokens[32007]) == ("<s>", "<|endoftext|>", "<|end|>")
    assert len(value("tokenizer.ggml.scores")) == len(tokens)


def test_longrope_factors_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"rope_scaling": {"type": "longrope"}}')
    with pytest.raises(ValueError, match="LongRoPE"):
        phi3_gguf.write_f16(tmp_path, tmp_path / "out.gguf")


def test_gguf_names_are_for_random_models_and_their_inputs_are_known():
    model = parse_model("mini2-q4_0")
    command = [str(part) for part in model_command(Path(sys.executable), model, Path("hf"), Path("out"))]
    assert command[1].endswith("phi3_gguf.py")
    assert command[2:6] == ["hf", "out", "--type", "q4_0"]
    assert {"phi3_gguf.py", "tiny_phi3.py", "peer-llama-cpp.txt"} <= {path.name for path in model.inputs()}
    with pytest.raises(BootstrapError, match="demo-q4_0"):
        parse_model("demo-q4_0")


LLAMA = """
import sys, llama_cpp
model = llama_cpp.Llama(model_path=sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
model.eval([int(token) for token in sys.argv[2:]])
print(int(model.scores[model.n_tokens - 1].argmax()) if model.scores.any() else model.sample(temp=0.0))
"""


@pytest.mark.skipif(not LLAMA_PYTHON.exists(), reason="llama.cpp is built by benchmarks/compare.py")
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_llama_cpp_quantises_and_opens_it(kind: str, tiny_hf: Path, tmp_path: Path):
    script = [LLAMA_PYTHON, phi3_gguf.__file__, tiny_hf, tmp_path / "q", "--type", kind]
    done = subprocess.run(
        [*script, "--downloads", cache_dir() / "downloads"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "q").iterdir()] == [phi3_gguf.FILE]
    done = subprocess.run(
        [LLAMA_PYTHON, "-c", LLAMA, tmp_path / "q" / phi3_gguf.FILE, "1", "15043"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) < 32064


@pytest.mark.skipif(not LLAMA_PYTHON.exists(), reason="llama.cpp is built by benchmarks/compare.py")
def test_llama_cpp_predicts_the_reference_s_token(written: Path, tiny_pipe: Any):
    """In float16 the token after a prompt is that of the float32 export: the order of the weights is right."""
    ids = [1, 15043, 3186, 29892, 920]
    done = subprocess.run(
        [LLAMA_PYTHON, "-c", LLAMA, written, *map(str, ids)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reply = tiny_pipe.generate(ids, max_new_tokens=1, do_sample=False, ignore_eos=True)
    assert int(done.stdout) == reply.token_ids[0]
