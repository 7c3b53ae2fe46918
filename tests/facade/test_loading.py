"""`load`: checks, warnings, and no backend left behind after a failure."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedBackend

import ov_phi3
from ov_phi3 import ConfigError, ContextOverflowError, DeviceError, ModelError, ModelWarning, Pipeline
from ov_phi3.backends.llm_pipeline import LLMPipelineSpec

CAPITAL = "What is the capital of France?"


class TestLoading:
    """Arguments, warnings, the compile cache and model directories."""

    def test_reports_the_full_device_name(self, pipe: Pipeline) -> None:
        assert pipe.device.full_name
        assert pipe.device.full_name in repr(pipe)
        assert pipe.load_report.ov_config["PERFORMANCE_HINT"] == "LATENCY"
        assert pipe.load_report.warnings == ()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"device": "GPU.7"}, DeviceError, "GPU.7"),
            ({"device": "TPU"}, ConfigError, "TPU"),
            ({"backend": "llm"}, ConfigError, "llm_pipeline"),
            ({"ov_config": {"PERFORMANCE_HNT": "LATENCY"}}, ConfigError, "PERFORMANCE_HINT"),
            ({"context_length": 10**9}, ConfigError, "context_length"),
            ({"context_length": "long"}, TypeError, "context_length"),
            ({"kv_cache_gb": 0.0}, ConfigError, "at least"),
            ({"kv_cache_gb": "2"}, TypeError, "kv_cache_gb"),
            ({"kv_cache_gb": float("inf")}, ConfigError, "kv_cache_gb"),
            ({"kv_cache_gb": 10**400}, ConfigError, "kv_cache_gb"),
            ({"kv_cache_gb": float("nan")}, ConfigError, "kv_cache_gb"),
            ({"template": "phi3"}, TypeError, "ChatTemplate"),
            ({"ov_config": {"ATTENTION_BACKEND": "FOO"}}, ConfigError, "FOO"),
            ({"ov_config": {"NUM_STREAMS": object()}}, ConfigError, "ov_config"),
        ],
    )
    def test_bad_arguments(
        self, demo_int4: Path, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            ov_phi3.load(demo_int4, **{"device": "CPU", **options})

    def test_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            ov_phi3.load(tmp_path / "nothing")

    def test_unknown_home(self) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            ov_phi3.load("~nosuchuser/model")

    def test_broken_graph_is_the_models_fault(self, demo_int4: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(demo_int4, broken, copy_function=os.link)
        path = broken / "openvino_model.xml"
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text.replace(b'type="MatMul"', b'type="MatMux"', 1))
        with pytest.raises(ModelError, match=r"openvino_model\.xml is damaged"):
            ov_phi3.load(broken, device="CPU")

    def test_openvino_packages_that_do_not_fit(self, demo_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        installed = {"openvino": "2026.4.1", "openvino-genai": "2026.3.0.0", "openvino-tokenizers": "2026.4.1.0"}
        monkeypatch.setattr("ov_phi3.system.versions.installed", lambda: installed)
        with pytest.raises(DeviceError, match="pip install"):
            ov_phi3.load(demo_int4)

    def test_context_length(self, demo_int4: Path, device: str) -> None:
        with ov_phi3.load(demo_int4, device=device, context_length=64) as small:
            result = small.generate(CAPITAL, ignore_eos=True)
            assert len(result.prompt_token_ids) + len(result.token_ids) == 64
            with pytest.raises(ContextOverflowError, match="64"):
                small.generate([1] * 64)
            assert "Paris" in small.generate(CAPITAL).text

    def test_the_models_own_template_is_used_or_reported(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(demo_int4, other, copy_function=os.link)
        path = other / "chat_template.jinja"
        source = path.read_text()
        path.unlink()
        path.write_text(source.replace("<|end|>\\n", "<|end|>").replace("<|end|>\n", "<|end|>"))
        with ov_phi3.load(other, device=device) as loaded:
            rendered = loaded.tokenizer.template.render([{"role": "user", "content": "Hi"}])
            assert rendered == "<|user|>\nHi<|end|><|assistant|>\n"
        path.write_text("{{ messages|nosuch }}")
        with pytest.warns(ov_phi3.ModelWarning, match="Messages are refused"):
            loaded = ov_phi3.load(other, device=device)
        with loaded:
            assert loaded.generate(ov_phi3.Raw("Hi"), max_new_tokens=1).token_ids

    def test_compile_cache_is_kept_apart_and_checked(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        config = {"CACHE_DIR": str(tmp_path / "cache")}
        with ov_phi3.load(demo_int4, device=device, ov_config=config) as first:
            assert first.load_report.cache == "fresh"
        with ov_phi3.load(demo_int4, device=device, ov_config=config) as second:
            assert second.load_report.cache == "verified"
            folder = second.load_report.cache_dir
            assert folder is not None
        record = json.loads((folder / "canary.json").read_text())
        record["token_ids"][0] += 1
        (folder / "canary.json").write_text(json.dumps(record))
        with ov_phi3.load(demo_int4, device=device, ov_config=config) as third:
            assert third.load_report.cache == "purged"
            assert "Paris" in third.generate(CAPITAL).text

    def test_sdpa_gives_the_same_ids(self, demo_fp32: Path, device: str) -> None:
        with ov_phi3.load(demo_fp32, device=device) as paged:
            expected = paged.generate(CAPITAL).token_ids
        with ov_phi3.load(demo_fp32, device=device, ov_config={"ATTENTION_BACKEND": "SDPA"}) as sdpa:
            assert [sdpa.generate(CAPITAL).token_ids for _ in range(2)] == [expected] * 2

    def test_warmup_returns_its_time(self, pipe: Pipeline) -> None:
        assert pipe.warmup() > 0

    def test_model_in_a_directory_with_spaces_and_accents(self, demo_int4: Path, device: str, tmp_path: Path) -> None:
        odd = tmp_path / "modèle de démo 日本"
        shutil.copytree(demo_int4, odd, copy_function=os.link)
        with ov_phi3.load(odd, device=device) as loaded:
            assert "Paris" in loaded.generate(CAPITAL).text


class TestFailuresAfterTheModelIsLoaded:
    """The backend is closed: a failed load leaves no model in memory."""

    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
        """The backend that `load` opens."""
        backend = ScriptedBackend()
        monkeypatch.setattr(LLMPipelineSpec, "open", lambda *_: backend)
        return backend

    def load(self, path: Path) -> Pipeline:
        return ov_phi3.load(path, device="CPU", ov_config={"CACHE_DIR": ""})

    def test_success_leaves_it_open(self, demo_int4: Path, backend: ScriptedBackend) -> None:
        with self.load(demo_int4):
            assert not backend.closed
        assert backend.closed

    def test_a_warning_that_is_an_error(self, demo_int4: Path, backend: ScriptedBackend) -> None:
        """pytest turns warnings into errors, as `warnings.simplefilter("error")` does."""
        backend.warnings.append("something works, but slowly")
        with pytest.raises(ModelWarning, match="slowly"):
            self.load(demo_int4)
        assert backend.closed

    @pytest.mark.parametrize("where", ["ov_phi3.loading.give_memory_back", "ov_phi3.loading.Runner"])
    def test_ctrl_c(
        self, demo_int4: Path, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.load(demo_int4)
        assert backend.closed

    def test_a_tokenizer_that_does_not_open(
        self, demo_int4: Path, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(*_: object, **__: object) -> None:
            raise ModelError("damaged")

        monkeypatch.setattr("ov_phi3.loading.Tokenizer", failing)
        with pytest.raises(ModelError, match="damaged"):
            self.load(demo_int4)
        assert backend.closed
