"""Our own decode loop on `openvino.InferRequest`, over the same exported graph.

It gives access to what `openvino_genai.LLMPipeline` keeps internal: the logits of every step, and the keys and values
of every sequence, which can be read, written and saved. `docs/kv-snapshots.md` describes their use.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ov_phi3.backends.graph import ROWS, Graph
from ov_phi3.backends.kv_slots import KVSlots, Slot
from ov_phi3.backends.longrope_graph import mark_ids
from ov_phi3.backends.protocol import BackendReport, Cancelled, Capabilities, Hypothesis
from ov_phi3.backends.sampling import Sampler, log_softmax
from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.system.core import import_openvino, keeping_signal_stack, never_freed_in_children, shared_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.protocol import Backend, LoadRequest, Request, TokenSink
    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["CAPABILITIES", "InferRequestBackend", "InferRequestSpec"]

CAPABILITIES = Capabilities("infer_request", saves_kv=True, scores=True, cancels_within_pass=True)

_PRECISIONS = ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
_INTEGERS = ("u8", "u4", "i8", "i4", "uint8_t", "uint4_t", "int8_t", "int4_t")
_SCORED_PER_PASS = 256  # rows of logits per pass: 50 MB with a vocabulary of 49,152
_SCORED_AT_ONCE = 64  # rows converted to float64 together, which doubles their size
_LONG_PASS = 16  # tokens from which a pass may take long enough to be cancelled
_POLL_MS = 50  # interval of the checks whether it is still wanted
_SEEDS_APART = 0x9E3779B97F4A7C15  # 2**64 / golden ratio

_UNSUPPORTED = {
    "num_beams": "beam search",
    "json_schema": "structured output",
    "regex": "structured output",
    "grammar": "structured output",
    "num_assistant_tokens": "speculative decoding",
    "assistant_confidence_threshold": "speculative decoding",
}


_FOREIGN_PROPERTIES = ("adapters", "draft_model", "extensions", "prompt_lookup", "scheduler_config")
_ONE_TOKEN = GenerationConfig.one_token()


class InferRequestSpec:
    """`backend="infer_request"` before a model is loaded."""

    @property
    def capabilities(self) -> Capabilities:
        """What a loaded model can do."""
        return CAPABILITIES

    def resolve_properties(self, device: DeviceInfo, properties: Mapping[str, Any]) -> dict[str, Any]:
        """The properties with a float16 cache unless a precision is given, so that it can be saved exactly.

        Integers, the CPU's default, take half the memory, but OpenVINO returns them as float32 only and quantises them
        again when they are written back: slower, and not exact.

        Raises:
            ConfigError: a property of `LLMPipeline`, or a device that cannot return its state.
        """
        if device.kind == "NPU":
            raise ConfigError(f"backend='infer_request' runs on CPUs and GPUs, not on {device.name}.")
        for key in _FOREIGN_PROPERTIES:
            if key in properties:
                raise ConfigError(f"ov_config key {key!r} belongs to backend='llm_pipeline'; leave it out.")
        attention = str(properties.get("ATTENTION_BACKEND", "SDPA")).upper()
        if attention != "SDPA":
            raise ConfigError(f"ATTENTION_BACKEND={attention} belongs to backend='llm_pipeline'; leave it out.")
        precision = {} if any(key in properties for key in _PRECISIONS) else {"KV_CACHE_PRECISION": "f16"}
        return {**precision, **{key: value for key, value in properties.items() if key != "ATTENTION_BACKEND"}}

    def check_concurrency(self, request: LoadRequest) -> str | None:  # noqa: ARG002
        """Another backend: this one runs one request at a time."""
        return "backend='llm_pipeline'"

    def open(self, request: LoadRequest) -> InferRequestBackend:
        """Load the model."""
        return InferRequestBackend(
            request.info.path,
            request.device.name,
            request.properties,
            capacity=max(request.kv.context_length, request.kv.capacity),
            rope_boundary=request.info.rope_boundary,
        )

    def fallback(self, request: LoadRequest, reason: str) -> None:  # noqa: ARG002
        """None."""
        return


class InferRequestBackend:
    """One compiled model, and a slot for each sequence.

    Args:
        model_dir: an exported model.
        device: an OpenVINO device name.
        properties: for `Core.compile_model`.
        capacity: tokens that all slots together may hold.
        rope_boundary: see `ModelInfo.rope_boundary`.

    Attributes:
        warnings: sentences about what works, but not as it should.
        slots: the sequences, and the index of what is cached.
        needs_whole_prompts: whether a long prompt must be prefilled in one pass.
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
        never_freed_in_children(self)
        self._tensor_type = import_openvino().Tensor
        self._boundary = rope_boundary
        self.warnings: list[str] = []
        with keeping_signal_stack():
            graph = Graph(model_dir, rope_boundary)
            self._compiled: Any = shared_core().compile_model(graph.model, device, dict(properties))
        self._graph = graph
        self._inputs = {name for port in graph.model.inputs for name in port.get_names()}
        self.needs_whole_prompts = rope_boundary is not None and not graph.marks
        if self.needs_whole_prompts:
            self.warnings.append(f"long prompts of this LongRoPE model are prefilled in one pass ({graph.problem}).")
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
        """The types that the state may be held in, by the precisions that the device reports."""
        reported = set()
        for key in _PRECISIONS:
            try:
                reported.add(str(self._compiled.get_property(key).to_string()))
            except (RuntimeError, AttributeError):  # a device without this property
                continue
        if reported & set(_INTEGERS):
            return ("F16",)
        return ("F32",) if "f32" in reported else ("BF16", "F16")

    # -- the protocol ------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return CAPABILITIES

    @property
    def prefix_index(self) -> KVSlots:
        """The slots, whose contents are known exactly."""
        return self.slots

    def unsupported(self, config: GenerationConfig) -> str | None:
        """Beam search, structured output and speculation."""
        for name, what in _UNSUPPORTED.items():
            value = getattr(config, name)
            if value is not None and not (name == "num_beams" and value == 1):
                return f"{what} ({name}) is not in backend='infer_request'; load with backend='llm_pipeline' for it."
        if config.is_multi_sequence and config.top_logprobs is not None:
            return "top_logprobs is for one reply; num_return_sequences gives each reply's score."
        return None

    def uses_prefix_cache(self, request: Request) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        """Stream one reply."""
        began = time.perf_counter()
        config = request.config
        sampler = Sampler(config, request.ids, request.end_ids)
        stop_ids = request.stop_ids
        limit = config.max_new_tokens or 0
        slot = self.slots.acquire(request)
        logits = self._pass(slot, request.ids[slot.length :], should_continue=request.should_continue)[-1]
        generated: list[int] = []
        first = last = began
        while True:
            token = sampler.choose(logits)
            last = time.perf_counter()
            first = first if generated else last
            generated.append(token)
            logprob = sampler.logprobs(logits, token)
            proceed = sink([token]) if logprob is None else sink([token], (logprob,))
            if token in stop_ids or len(generated) >= limit or not proceed:
                break
            logits = self._step(slot, token)
        return BackendReport(
            hit_limit=len(generated) >= limit and token not in stop_ids,
            ttft_ms=(first - began) * 1000.0,
            tpot_ms=(last - first) * 1000.0 / (len(generated) - 1) if len(generated) > 1 else None,
            generated=generated,
        )

    def generate_n(self, request: Request) -> list[Hypothesis]:
        """Several samples, one after another, the likeliest first; the score is the sum of the log-probabilities.

        The prompt is prefilled once; every sample starts from a copy of its keys and values.
        """
        entry = self._prefill_once(request)
        hypotheses = []
        for index in range(request.config.num_return_sequences or 1):
            seed = ((request.config.seed or 0) + index * _SEEDS_APART) % 2**64
            config = request.config.replace(seed=seed, num_return_sequences=1, top_logprobs=0)
            sample = _Sample(request.should_continue)
            try:
                report = self.generate(replace(request, config=config), sample)
            except Cancelled:
                break
            hypotheses.append(Hypothesis(sample.ids, sample.score, report.hit_limit))
            if sample.stopped:
                break
        del entry  # requests may start from it for as long as it is referenced
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)

    def _prefill_once(self, request: Request) -> KVEntry | None:
        """The keys and values of a prompt, for as long as the result is referenced; None for a prompt of one token."""
        ids = request.ids[:-1]
        if not len(ids):
            return None
        self.generate(replace(request, ids=ids, config=_ONE_TOKEN, end_ids=()), lambda *_: True)
        entry = self.slots.export(ids, long_rope=request.long_rope)
        self.slots.register(entry)
        return entry

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:
        """Log-probabilities of the request's ids from `start` on, each given all ids before it."""
        ids = request.ids
        slot = self.slots.acquire(replace(request, ids=ids[:start]))
        logprobs: list[float] = []
        while (done := slot.length) < len(ids) - 1 and on_progress(done):
            scored = done >= start - 1
            most = _SCORED_PER_PASS if scored else chunk or len(ids)
            part = ids[done : min(len(ids) - 1 if scored else start - 1, done + most)]
            rows = np.arange(len(part) if scored else 0, dtype=np.int64)
            logits = self._pass(slot, part, rows if scored else None, request.should_continue)
            for at in range(0, len(rows), _SCORED_AT_ONCE):
                batch = rows[at : at + _SCORED_AT_ONCE]
                values = log_softmax(logits[at : at + len(batch)])
                logprobs += values[np.arange(len(batch)), ids[done + batch + 1]].tolist()
        return logprobs

    def export_kv(self, ids: NDArray[np.int64], *, long_rope: bool) -> KVEntry:
        """A copy of the cached keys and values of the longest cached beginning of these ids."""
        return self.slots.export(ids, long_rope=long_rope)

    def import_kv(self, entry: KVEntry) -> None:
        """Let requests start from an entry for as long as it is referenced elsewhere."""
        self.slots.register(entry)

    def render_template(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> None:  # noqa: ARG002
        """None: this backend has no Jinja interpreter, and GenAI's needs the memory of its tokenizer."""
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
        should_continue: Callable[[], bool] | None = None,
    ) -> NDArray[np.float32]:
        """Compute more ids of a sequence; returns the logits of the given rows, or of the last one.

        Raises:
            Cancelled: `should_continue` returned False.

        Returns:
            float32, shape [rows, vocabulary]; valid until the next pass.
        """
        begin, marked = slot.length, ids
        if slot.long_rope and self._boundary is not None and self._graph.marks and begin < self._boundary:
            marked = mark_ids(ids, self._boundary - begin)
        chosen = np.array([len(ids) - 1], dtype=np.int64) if rows is None else rows
        slot.stepping = False
        logits = self._infer(slot, ids, self._inputs_of(marked, begin, chosen), should_continue, len(chosen))
        return logits if self._graph.rows else logits[chosen]

    def _step(self, slot: Slot, token: int) -> NDArray[np.float32]:
        """Compute one more id of a sequence; logits, float32, shape [vocabulary], valid until the next pass."""
        self._one[0, 0] = token
        self._at[0, 0] = slot.length
        # The tensors of a step are views of these arrays, so an infer request needs them only once.
        logits = self._infer(slot, self._one[0], {} if slot.stepping else self._step_tensors)
        slot.stepping = True
        last: NDArray[np.float32] = logits[-1]
        return last

    def _infer(
        self,
        slot: Slot,
        ids: NDArray[np.int64],
        tensors: Mapping[str, Any],
        should_continue: Callable[[], bool] | None = None,
        rows: int = 1,
    ) -> NDArray[np.float32]:
        request, total = slot.request, slot.length + len(ids)
        shape = (len(ids), total, rows)
        if total > self._mask.shape[1]:
            self._mask = np.ones((1, max(total, 2 * self._mask.shape[1])), dtype=np.int64)
        self._set(request, total, tensors)
        with slot.changing():
            try:
                if should_continue is None or len(ids) < _LONG_PASS:
                    request.infer()
                else:
                    self._infer_while(request, should_continue)
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
        """Repair the compiled model after a pass that did not end, with another pass of a few tokens.

        All requests share the CPU plugin's nodes. A node that the broken pass did not reach has outputs of that pass's
        shape and remembers the input shapes of the pass before. A later pass with those input shapes then skips the
        node's preparation: it fails, or kills the process (openvino 2026.4.1). Input shapes that differ from both make
        every node prepare again.
        """
        known = {*broken, *self._shape}
        rows = next(count for count in range(1, 8) if count not in known)
        tokens = next(count for count in range(rows, 16) if count not in known)
        inputs = self._inputs_of(np.zeros(tokens, dtype=np.int64), 0, np.zeros(rows, dtype=np.int64))
        with contextlib.suppress(RuntimeError):  # a broken engine fails at the next pass
            request.reset_state()
            self._set(request, tokens, inputs)
            request.infer()
            self._shape = (tokens, tokens, rows)

    @staticmethod
    def _infer_while(request: Any, should_continue: Callable[[], bool]) -> None:
        """A pass that is cancelled when `should_continue` is False: in 6 to 33 ms on the CPU (openvino 2026.4.1)."""
        request.start_async()
        while not request.wait_for(_POLL_MS):
            if not should_continue():
                request.cancel()
                with contextlib.suppress(RuntimeError):  # reports that it was cancelled
                    request.wait()
                raise Cancelled


class _Sample:
    """A `TokenSink` for one of several samples."""

    def __init__(self, should_continue: Callable[[], bool] | None) -> None:
        self.ids: list[int] = []
        self.score = 0.0
        self.stopped = False
        self._should_continue = should_continue

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        self.ids += ids
        self.score += sum(entry.logprob for entry in logprobs)
        self.stopped = self._should_continue is not None and not self._should_continue()
        return not self.stopped


def _check_protocol(backend: InferRequestBackend) -> Backend:
    return backend  # mypy holds the class against the protocol here
