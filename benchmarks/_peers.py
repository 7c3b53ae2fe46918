"""The runtimes that `compare.py` measures: the environment, the model and the process of each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _environment import (
    ROOT,
    BootstrapError,
    cache_dir,
    child_environment,
    ensure_environment,
    quickstart_python,
    run_step,
)

__all__ = ["PEERS", "Inputs", "Peer", "Worker", "WorkerError", "llama_cpp_python", "ort_genai_model"]

SCRIPTS = ROOT / "benchmarks" / "peers"


class WorkerError(RuntimeError):
    """A peer's process failed; the message is the peer's."""


@dataclass(frozen=True)
class Inputs:
    """Paths of one model in several formats.

    Attributes:
        exported: OpenVINO IR, for this library, raw GenAI and optimum-intel.
        source: Hugging Face format, for builders; None if unknown.
        gguf: GGUF file, for llama.cpp; None if unknown.
    """

    exported: Path
    source: Path | None
    gguf: Path | None


@dataclass(frozen=True)
class Peer:
    """One runtime to compare.

    Attributes:
        name: its common name.
        script: its file in `peers/`.
        prepare: makes its environment and model and returns both paths; raises `BootstrapError` with the reason.
        devices: kinds of device that this setup supports.
        unequal: conditions that could not be made equal, shown beside its figures.
        options: options of its own for loading, beside those of all peers.
    """

    name: str
    script: str
    prepare: Callable[[Inputs], tuple[Path, Path]]
    devices: tuple[str, ...]
    unequal: str
    options: dict[str, Any] = field(default_factory=dict)


class Worker:
    """The process of a peer, which answers requests in JSON lines (`peers/protocol.py`)."""

    def __init__(self, peer: Peer, python: Path, log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, SCRIPTS / peer.script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=child_environment(),
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            WorkerError: the request failed, or the process ended.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(f"its process ended with exit code {process.wait()}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _peer_dir(name: str) -> Path:
    return cache_dir() / "peers" / name


def _ours(inputs: Inputs) -> tuple[Path, Path]:
    return ensure_environment(ROOT / ".venv-bench", ["bench"]), inputs.exported


def _genai(inputs: Inputs) -> tuple[Path, Path]:
    return ensure_environment(_peer_dir("genai"), ["peer-genai"], library=False), inputs.exported


def _optimum(inputs: Inputs) -> tuple[Path, Path]:
    return quickstart_python(), inputs.exported


def llama_cpp_python() -> Path:
    """The interpreter of llama.cpp's environment, built for this machine's processor."""
    # Build the library only: its tools, server and tests take most of the build time.
    parts = ("LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER", "LLAVA_BUILD")
    flags = ["-DGGML_NATIVE=ON", *(f"-D{part}=OFF" for part in parts)]
    variables = {
        "CMAKE_ARGS": " ".join(flags),
        # gcc 12 takes the tile configuration for the AMX kernels to be unused, and removes it: illegal instructions.
        "CXXFLAGS": "-fno-dse -fno-tree-dse",
        # pip would take a wheel that it built before with other flags.
        "PIP_NO_CACHE_DIR": "1",
    }
    return ensure_environment(_peer_dir("llama-cpp"), ["peer-llama-cpp"], library=False, variables=variables)


def _llama_cpp(inputs: Inputs) -> tuple[Path, Path]:
    if inputs.gguf is None:
        raise BootstrapError("no GGUF file of this model; pass one with --gguf")
    return llama_cpp_python(), inputs.gguf


def _ort_genai(inputs: Inputs) -> tuple[Path, Path]:
    if inputs.source is None:
        raise BootstrapError("its builder needs the model in Hugging Face format; pass it with --hf")
    python = ensure_environment(_peer_dir("ort-genai"), ["peer-ort-genai"], library=False)
    model = ort_genai_model(inputs.source)
    if not (model / "genai_config.json").exists():
        # int4_accuracy_level=4 computes with 8-bit activations, as the other int4 runtimes here do.
        options = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
        builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", inputs.source, "-o", model, *options]
        run_step("build the model for onnxruntime-genai", builder, _peer_dir("ort-builder.log"))
    return python, model


def ort_genai_model(source: Path) -> Path:
    """Where the model of onnxruntime-genai lies that is built from a source."""
    return _peer_dir("models") / f"{source.parent.name}-{source.name}-ort-int4"


PEERS = (
    Peer("ov_phi3", "ov_phi3_peer.py", _ours, ("CPU", "GPU", "NPU"), ""),
    Peer(
        "openvino_genai",
        "genai_peer.py",
        _genai,
        ("CPU", "GPU", "NPU"),
        "the same files and the same properties; it grows its KV cache on demand, ov_phi3 allocates it at load",
    ),
    Peer(
        "optimum-intel",
        "optimum_peer.py",
        _optimum,
        ("CPU", "GPU"),
        "the same files and the same properties; it prefills every prompt in full",
    ),
    Peer(
        "llama.cpp",
        "llama_cpp_peer.py",
        _llama_cpp,
        ("CPU",),
        "the same weights before quantisation: all layers in 4 bits (Q4_1), where the IR has 40 % of them in 8; the "
        "embedding in 8 bits in both; KV cache of 16 bits against 8",
    ),
    Peer(
        "onnxruntime-genai",
        "ort_genai_peer.py",
        _ort_genai,
        ("CPU",),
        "the same weights before quantisation, in 4 bits with blocks of 32, the output layer too, where the IR has 8 "
        "bits for that and for 40 % of the layers; KV cache of 32 bits against 8",
    ),
)
