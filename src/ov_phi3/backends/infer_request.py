"""Our own decode loop on `openvino.InferRequest`, over the same exported graph.

What `openvino_genai.LLMPipeline` keeps to itself is in the open here: the logits of every step, and the keys and values
of every sequence, which can be read, written, and so saved. `docs/kv-snapshots.md` says what that is good for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ov_phi3.backends.graph import ROWS, Graph, mark
from ov_phi3.backends.kv_slots import KVSlots, Slot
from ov_phi3.backends.protocol import Cancelled, EngineReport, Hypothesis
from ov_phi3.backends.sampling import Sampler, log_softmax
from ov_phi3.errors import ConfigError
from ov_phi3.system.core import keeping_signal_stack, never_freed_in_children, shared_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.protocol import Emit, Request
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["InferRequestBackend", "infer_request_properties"]

_PRECISIONS = ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
_INTEGERS = ("u8", "u4", "i8", "i4", "uint8_t", "uint4_t", "int8_t", "int4_t")
_SCORED_PER_PASS = 256  # rows of logits that the engine gives at once: 50 MB with a vocabulary of 49,152
_SCORED_AT_ONCE = 64  # rows of them that are looked at together: in float64 they are twice as large
_LONG_PASS = 16  # tokens from which a pass may take long enough to be given up within
_POLL_MS = 50  # how often it is asked whether it is still wanted
_SEEDS_APART = 0x9E3779B97F4A7C15  # 2**64 / golden ratio

_UNSUPPORTED = {
    "num_beams": "beam search",
    "json_schema": "structured output",
    "regex": "structured output",
    "grammar": "structured output",
    "num_assistant_tokens": "speculative decoding",
    "assistant_confidence_threshold": "speculative decoding",
}


_NOT_HERE = ("adapters", "draft_model", "extensions", "prompt_lookup", "scheduler_config")


def infer_request_properties(device: DeviceInfo, properties: Mapping[str, Any]) -> dict[str, Any]:
    """The properties for this backend: a cache in float16 unless another is named, which can be saved exactly.

    Integers, the CPU's default, are half as large, but OpenVINO gives them out as float32 only and quantises them again
    when they come back: slower, and not exact.

    Raises:
        ConfigError: a property that belongs to `LLMPipeline`, or a device that cannot give its state.
    """
    if device.kind == "NPU":
        raise ConfigError(f"backend='infer_request' runs on CPUs and GPUs, not on {device.name}.")
    for key in _NOT_HERE:
        if key in properties:
            raise ConfigError(f"ov_config key {key!r} belongs to backend='llm_pipeline'; leave it out.")
    attention = str(properties.get("ATTENTION_BACKEND", "SDPA")).upper()
    if attention != "SDPA":
        raise ConfigError(f"ATTENTION_BACKEND={attention} belongs to backend='llm_pipeline'; leave it out.")
    precision = {} if any(key in properties for key in _PRECISIONS) else {"KV_CACHE_PRECISION": "f16"}
    return {**precision, **{key: value for key, value in properties.items() if key != "ATTENTION_BACKEND"}}


class InferRequestBackend:
    """One compiled model, and a slot for each sequence.

    Args:
        model_dir: an exported model.
        device: an OpenVINO device name.
        properties: for `Core.compile_model`.
        capacity: tokens that all slots together may hold.
        rope_boundary: see `ModelInfo.rope_boundary`.

    Attributes:
        doubts: what works, but not as it should; sentences.
        slots: where the sequences live; the books of what is cached.
        whole_prompts: whether a long prompt must be computed in one piece.
    """

    def __init__(
        self,
        model_dir: Path,
        device: str,
        properties: Mapping[str, Any],
        *,
        capacity: int,
        rope_boundary: int | None = None,
    ) -> None:
        import openvino

        never_freed_in_children(self)
        self._tensor_type = openvino.Tensor
        self._boundary = rope_boundary
        self.doubts: list[str] = []
        with keeping_signal_stack():
            graph = Graph(model_dir, rope_boundary)
            self._compiled: Any = shared_core().compile_model(graph.model, device, dict(properties))
        self._graph = graph
        self._inputs = {name for port in graph.model.inputs for name in port.get_names()}
        self.whole_prompts = rope_boundary is not None and not graph.marks
        if self.whole_prompts:
            self.doubts.append(f"long prompts of this LongRoPE model are computed in one piece ({graph.doubt}).")
        self.slots = KVSlots(self._compiled.create_infer_request, capacity, self._candidates())
        self._one = np.zeros((1, 1), dtype=np.int64)
        self._at = np.zeros((1, 1), dtype=np.int64)
        self._constant = {"beam_idx": self._tensor(np.zeros(1, dtype=np.int32))}
        self._step_tensors = {
            "input_ids": self._tensor(self._one),
            "position_ids": self._tensor(self._at),
            ROWS: self._tensor(np.zeros(1, dtype=np.int64)),
            **self._constant,
        }
        self._mask = np.ones((1, 1024), dtype=np.int64)
        self._shape = (1, 1, 1)

    def _candidates(self) -> tuple[str, ...]:
        """In which types the state may be held, by what the device says of its cache."""
        held = set()
        for key in _PRECISIONS:
            try:
                held.add(str(self._compiled.get_property(key).to_string()))
            except (RuntimeError, AttributeError):  # a device that does not tell
                continue
        if held & set(_INTEGERS):
            return ("F16",)
        return ("F32",) if "f32" in held else ("BF16", "F16")

    # -- the protocol ------------------------------------------------------------------------------------------------

    @property
    def prefix_cache(self) -> None:
        """None: `slots` keeps the books itself."""
        return

    def lacks(self, config: GenerationConfig) -> str | None:
        """What this loop does not do."""
        for name, what in _UNSUPPORTED.items():
            value = getattr(config, name)
            if value is not None and not (name == "num_beams" and value == 1):
                return f"{what} ({name}) is not in backend='infer_request'; load with backend='llm_pipeline' for it."
        if config._is_search() and config.top_logprobs is not None:
            return "top_logprobs is for one reply; num_return_sequences gives each reply's score."
        return None

    def caches(self, request: Request) -> bool:  # noqa: ARG002
        """Always: what is in the slots is known id by id."""
        return True

    def generate(self, request: Request, emit: Emit) -> EngineReport:
        """Stream one reply."""
        begun = time.perf_counter()
        config = request.config
        sampler = Sampler(config, request.ids, request.end_ids)
        ends = request.ends
        limit = config.max_new_tokens or 0
        slot = self.slots.begin(request)
        logits = self._pass(slot, request.ids[slot.length :], wanted=request.wanted)[-1]
        made: list[int] = []
        first = last = begun
        while True:
            token = sampler.choose(logits)
            last = time.perf_counter()
            first = first if made else last
            made.append(token)
            logprob = sampler.logprobs(logits, token)
            going = emit([token]) if logprob is None else emit([token], (logprob,))
            if token in ends or len(made) >= limit or not going:
                break
            logits = self._step(slot, token)
        return EngineReport(
            hit_limit=len(made) >= limit and token not in ends,
            ttft_ms=(first - begun) * 1000.0,
            tpot_ms=(last - first) * 1000.0 / (len(made) - 1) if len(made) > 1 else None,
            generated=made,
        )

    def search(self, request: Request) -> list[Hypothesis]:
        """Several samples, one after another, the likeliest first; the score is the sum of the log-probabilities."""
        found = []
        for index in range(request.config.num_return_sequences or 1):
            seed = ((request.config.seed or 0) + index * _SEEDS_APART) % 2**64
            config = request.config.replace(seed=seed, num_return_sequences=1, top_logprobs=0)
            sample = _Sample()
            report = self.generate(replace(request, config=config), sample)
            found.append(Hypothesis(sample.ids, sample.score, report.hit_limit))
        return sorted(found, key=lambda one: -one.score)

    def score(self, request: Request, start: int, watch: Callable[[int], bool], chunk: int) -> list[float]:
        """Log-probabilities of a request's ids from `start` on, each given all before it.

        Args:
            request: whose ids to score.
            start: place of the first one, at least 1.
            watch: told how many tokens are done; False stops.
            chunk: tokens per pass of what comes before; 0 for all.
        """
        ids = request.ids
        slot = self.slots.begin(replace(request, ids=ids[:start]))
        found: list[float] = []
        while (done := slot.length) < len(ids) - 1 and watch(done):
            scored = done >= start - 1
            most = _SCORED_PER_PASS if scored else chunk or len(ids)
            part = ids[done : min(len(ids) - 1 if scored else start - 1, done + most)]
            rows = np.arange(len(part) if scored else 0, dtype=np.int64)
            logits = self._pass(slot, part, rows if scored else None, request.wanted)
            for at in range(0, len(rows), _SCORED_AT_ONCE):
                some = rows[at : at + _SCORED_AT_ONCE]
                logprobs = log_softmax(logits[at : at + len(some)])
                found += logprobs[np.arange(len(some)), ids[done + some + 1]].tolist()
        return found

    def render(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> None:  # noqa: ARG002
        """None: there is no Jinja here, and GenAI's would cost its tokenizer's memory."""
        return

    def close(self) -> None:
        """Free the model."""
        with keeping_signal_stack():
            self.slots.close()
            del self._compiled, self._graph

    # -- passes over the graph ---------------------------------------------------------------------------------------

    def _tensor(self, array: NDArray[Any]) -> Any:
        return self._tensor_type(array, shared_memory=True)

    def _inputs_of(self, ids: NDArray[np.int64], begin: int, rows: NDArray[np.int64]) -> dict[str, Any]:
        return {
            "input_ids": self._tensor(np.ascontiguousarray(ids[None])),
            "position_ids": self._tensor(np.arange(begin, begin + len(ids), dtype=np.int64)[None]),
            ROWS: self._tensor(rows),
            **self._constant,
        }

    def _pass(
        self,
        slot: Slot,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64] | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> NDArray[np.float32]:
        """Compute some more ids of a sequence; logits of the rows asked for, or of the last one.

        Raises:
            Cancelled: `wanted` said that nobody waits any more.

        Returns:
            float32, shape [rows, vocabulary]; valid until the next pass.
        """
        begin, given = slot.length, ids
        if slot.past and self._boundary is not None and self._graph.marks and begin < self._boundary:
            given = mark(ids, self._boundary - begin)
        chosen = np.array([len(ids) - 1], dtype=np.int64) if rows is None else rows
        slot.stepping = False
        logits = self._infer(slot, ids, self._inputs_of(given, begin, chosen), wanted, len(chosen))
        return logits if self._graph.rows else logits[chosen]

    def _step(self, slot: Slot, token: int) -> NDArray[np.float32]:
        """Compute one more id of a sequence; logits, float32, shape [vocabulary], valid until the next pass."""
        self._one[0, 0] = token
        self._at[0, 0] = slot.length
        # The tensors of a step are views of these arrays: an infer request needs to be told of them once.
        logits = self._infer(slot, self._one[0], {} if slot.stepping else self._step_tensors)
        slot.stepping = True
        last: NDArray[np.float32] = logits[-1]
        return last

    def _infer(
        self,
        slot: Slot,
        ids: NDArray[np.int64],
        tensors: Mapping[str, Any],
        wanted: Callable[[], bool] | None = None,
        rows: int = 1,
    ) -> NDArray[np.float32]:
        request, total = slot.request, slot.length + len(ids)
        shape = (len(ids), total, rows)
        if total > self._mask.shape[1]:
            self._mask = np.ones((1, max(total, 2 * self._mask.shape[1])), dtype=np.int64)
        self._set(request, total, tensors)
        with slot.changing():
            try:
                if wanted is None or len(ids) < _LONG_PASS:
                    request.infer()
                else:
                    self._infer_while(request, wanted)
            except BaseException:
                self._recover(request, shape)
                raise
            self._shape = shape
            self.slots.extend(slot, ids)
        logits = request.get_tensor("logits").data[0]
        if logits.dtype != np.float32:  # a device that computes in float16
            logits = logits.astype(np.float32)
        return cast("NDArray[np.float32]", logits)

    def _set(self, request: Any, total: int, tensors: Mapping[str, Any]) -> None:
        request.set_tensor("attention_mask", self._tensor(self._mask[:, :total]))
        for name, tensor in tensors.items():
            if name in self._inputs:
                request.set_tensor(name, tensor)

    def _recover(self, request: Any, broken: tuple[int, int, int]) -> None:
        """Make the compiled model right again after a pass that did not end, with another one, of a few tokens.

        All requests share the CPU plugin's nodes. One that the broken pass did not reach has outputs of that pass's
        shape and remembers the inputs of the pass before, so it takes the next pass with such inputs for one with
        nothing to do: that fails, or kills the process (openvino 2026.4.1). Inputs like neither set all of it afresh.
        """
        known = {*broken, *self._shape}
        rows = next(count for count in range(1, 8) if count not in known)
        tokens = next(count for count in range(rows, 16) if count not in known)
        inputs = self._inputs_of(np.zeros(tokens, dtype=np.int64), 0, np.zeros(rows, dtype=np.int64))
        with contextlib.suppress(RuntimeError):  # a broken engine says so itself, at the next pass
            request.reset_state()
            self._set(request, tokens, inputs)
            request.infer()
            self._shape = (tokens, tokens, rows)

    @staticmethod
    def _infer_while(request: Any, wanted: Callable[[], bool]) -> None:
        """A pass that is given up when nobody wants it any more: in 6 to 33 ms on the CPU (openvino 2026.4.1)."""
        request.start_async()
        while not request.wait_for(_POLL_MS):
            if not wanted():
                request.cancel()
                with contextlib.suppress(RuntimeError):  # says that it was cancelled
                    request.wait()
                raise Cancelled


class _Sample:
    """An `Emit` that takes in one of several samples."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.score = 0.0

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        self.ids += ids
        self.score += sum(entry.logprob for entry in logprobs)
        return True
