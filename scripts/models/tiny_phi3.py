"""Build a random Phi-3 of any size with the real Phi-3 tokenizer: a small one for tests with the real ids (32000 to
32010 among them), or a full-size one for speed measurements without a download.

The vocabulary and the test vectors come from the ``llama-cpp-python`` source distribution. Special tokens, chat
template and ids are those of microsoft/Phi-3-mini-4k-instruct. The weights are random, with a variance at which greedy
replies depend on the prompt. Needs numpy, gguf, safetensors and tokenizers, but neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import tempfile
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fetch import fetch
from model_files import PHI3_TEMPLATE, default_downloads, whole_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from tokenizers import AddedToken, Tokenizer

PACKAGE = "llama-cpp-python"
MODELS = "vendor/llama.cpp/models/"
VOCABULARY = MODELS + "ggml-vocab-phi-3.gguf"
PHI35_TEMPLATE = MODELS + "templates/microsoft-Phi-3.5-mini-instruct.jinja"
SEPARATOR = "\n__ggml_vocab_test__\n"

VOCAB_SIZE = 32064  # rows of the embedding; the tokenizer has 32011 tokens
SPM_SIZE = 32000  # tokens of the Llama vocabulary, before the added ones
# Approximate factor by which a matrix scales its input. Near one, attention and MLP affect the result; with the usual
# 0.02 a model of this size repeats the last token forever.
GAIN = 1.2


def sdist_file(name: str, downloads: Path | None = None) -> bytes:
    """Return one file of the source distribution."""
    with tarfile.open(fetch(PACKAGE, downloads or default_downloads())) as archive:
        for member in archive:
            if member.name.partition("/")[2] == name:
                file = archive.extractfile(member)
                if file is not None:
                    return file.read()
    raise RuntimeError(f"the {PACKAGE} source distribution has no {name}")


def template_phi35(downloads: Path | None = None) -> str:
    """Return the chat template published with microsoft/Phi-3.5-mini-instruct."""
    return sdist_file(PHI35_TEMPLATE, downloads).decode("utf-8")


def vectors(downloads: Path | None = None) -> list[dict[str, Any]]:
    """Return the published test vectors of the Phi-3 tokenizer, each ``{"text": ..., "ids": [...]}``."""
    texts = sdist_file(VOCABULARY + ".inp", downloads).decode("utf-8").split(SEPARATOR)
    lines = sdist_file(VOCABULARY + ".out", downloads).decode("utf-8").splitlines()
    ids = [[int(token) for token in line.split()] for line in lines]
    # Nothing follows the last separator.
    texts = texts[: len(ids)]
    return [{"text": text, "ids": row} for text, row in zip(texts, ids, strict=True)]


def vocabulary(downloads: Path | None = None) -> tuple[list[str], list[float]]:
    """Return the tokens and their scores, in the order of ids, without the tokens that pad the embedding."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        path = Path(work) / "vocabulary.gguf"
        path.write_bytes(sdist_file(VOCABULARY, downloads))
        reader = GGUFReader(path)
        fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "scores")]
    tokens, scores = (field.contents() for field in fields if field is not None)
    real = [not re.fullmatch(r"\[PAD\d+\]", token) for token in tokens]
    return list(compress(tokens, real)), list(compress(scores, real))


def merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Return the BPE merges of a SentencePiece vocabulary.

    Each split of a token into two other tokens is a merge. Tokens with higher scores merge first (the ids have another
    order: runs of spaces have low ids and the lowest scores), and of the splits of a token the one with the longest
    left part comes first. Bytes and control tokens have no merges.
    """
    ordinary = {
        token: score
        for token, score in zip(tokens[:SPM_SIZE], scores[:SPM_SIZE], strict=True)
        if not re.fullmatch(r"<(unk|s|/s|0x..)>", token)
    }
    pairs: list[tuple[str, str]] = []
    for token in sorted(ordinary, key=ordinary.__getitem__, reverse=True):
        cuts = [(token[:cut], token[cut:]) for cut in range(len(token) - 1, 0, -1)]
        pairs.extend((left, right) for left, right in cuts if left in ordinary and right in ordinary)
    return pairs


def added_tokens(tokens: list[str]) -> list[AddedToken]:
    """Return the added tokens with their published flags.

    ``rstrip`` makes a token absorb the white space after it. ``</s>`` is not special: skipping special tokens keeps it.
    """
    from tokenizers import AddedToken

    names = [*tokens[:3], *tokens[SPM_SIZE:]]
    without_rstrip = ("<unk>", "<s>", "<|endoftext|>")
    return [
        AddedToken(name, rstrip=name not in without_rstrip, normalized=False, special=name != "</s>") for name in names
    ]


def tokenizer(downloads: Path | None = None) -> Tokenizer:
    """Return the Phi-3 tokenizer: SentencePiece BPE in Hugging Face's format, without a beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = vocabulary(downloads)
    model = models.BPE(
        {token: i for i, token in enumerate(tokens[:SPM_SIZE])},
        merges(tokens, scores),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    result = Tokenizer(model)
    result.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in added_tokens(tokens):
        # One at a time, since ids follow the order of adding.
        (result.add_special_tokens if token.special else result.add_tokens)([token])
    return result


def tokenizer_config(context: int) -> dict[str, Any]:
    """Return the published ``tokenizer_config.json``, except the class, which needs a file that is not available."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "chat_template": PHI3_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": context,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def weights(config: dict[str, Any], seed: int) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield random normal weights, each matrix scaled by its number of inputs: the embedding, each layer, the head.

    One part at a time, since all weights of a full-size model take too much memory.
    """
    rng = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]

    def matrix(rows: int, columns: int, gain: float = GAIN) -> NDArray[np.float32]:
        return np.asarray(rng.standard_normal((rows, columns)) * (gain / columns**0.5), dtype=np.float32)

    yield {"model.embed_tokens.weight": matrix(VOCAB_SIZE, width, gain=width**0.5)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield {
            name + "self_attn.qkv_proj.weight": matrix(width + 2 * kv, width),
            name + "self_attn.o_proj.weight": matrix(width, width),
            name + "mlp.gate_up_proj.weight": matrix(2 * inner, width),
            name + "mlp.down_proj.weight": matrix(width, inner),
            name + "input_layernorm.weight": np.ones(width, np.float32),
            name + "post_attention_layernorm.weight": np.ones(width, np.float32),
        }
    yield {"model.norm.weight": np.ones(width, np.float32), "lm_head.weight": matrix(VOCAB_SIZE, width, gain=2.0)}


def save_weights(folder: Path, parts: Iterator[dict[str, NDArray[np.float32]]], count: int, dtype: str) -> None:
    """Write each of ``count`` parts to a separate file, and the index of the files."""
    from safetensors.numpy import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        stored = {name: weight.astype(dtype) for name, weight in part.items()}
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(stored, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(stored, file))
        total += sum(weight.nbytes for weight in stored.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def build(
    out: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    max_position_embeddings: int = 4096,
    original_max_position_embeddings: int | None = None,
    rope_scaling: dict[str, Any] | None = None,
    sliding_window: int | None = None,
    dtype: str = "float32",
    downloads: Path | None = None,
) -> Path:
    """Build the model in Hugging Face format at ``out``, with ``tokenizer_vectors.json`` beside it.

    ``rope_scaling`` has the published form: ``{"type": "longrope", "short_factor": [...], "long_factor": [...]}`` with
    ``hidden_size / heads / 2`` numbers each; the factors switch at ``original_max_position_embeddings``.
    ``sliding_window`` is 2047 on Phi-3-mini-4k and off by default here. ``dtype`` is the storage type of the weights,
    "float32" or "float16".
    """
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size or 2 * hidden_size,
        "max_position_embeddings": max_position_embeddings,
        "model_type": "phi3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads or heads,
        "original_max_position_embeddings": original_max_position_embeddings or max_position_embeddings,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope_scaling,
        "rope_theta": 10000.0,
        "sliding_window": sliding_window,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    with whole_directory(out) as folder:
        save_weights(folder, weights(config, seed), layers + 2, dtype)
        write_json(folder / "config.json", config)
        generation = {"bos_token_id": 1, "eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000}
        write_json(folder / "generation_config.json", generation)
        tokenizer(downloads).save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", tokenizer_config(max_position_embeddings))
        write_json(folder / "tokenizer_vectors.json", vectors(downloads))
    return out


def main() -> None:
    """Build a model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write, replaced if it exists")
    parser.add_argument("--downloads", type=Path, help="folder of downloaded packages")
    parser.add_argument("--options", type=json.loads, default={}, help="keyword arguments of build(), as a JSON object")
    options = parser.parse_args()
    print(build(options.out, downloads=options.downloads, **options.options))


if __name__ == "__main__":
    main()
