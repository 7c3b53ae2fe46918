"""Run Phi-3 class language models on Intel hardware with OpenVINO GenAI.

Importing this package imports neither openvino nor numpy: every name below is loaded when it is first used.
"""

from __future__ import annotations

from ov_phi3._version import __version__

TYPE_CHECKING = False  # type checkers take it for typing's, whose import would take most of this one's time
if TYPE_CHECKING:
    from ov_phi3.adapters import Adapters
    from ov_phi3.backends.protocol import (
        Backend,
        BackendName,
        BackendReport,
        Capabilities,
        EngineReport,
        Hypothesis,
        Request,
        TokenSink,
    )
    from ov_phi3.backends.words import TokenTexts
    from ov_phi3.bench.measuring import measure
    from ov_phi3.bench.prompts import random_prompt
    from ov_phi3.bench.report import Report
    from ov_phi3.bench.roofline import Roofline
    from ov_phi3.bench.samples import ChatTurn, Measurement
    from ov_phi3.bench.summary import Summary
    from ov_phi3.chat import Chat
    from ov_phi3.doctor import Check, CheckStatus, diagnose
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.errors import (
        ClosedError,
        ConfigError,
        ContextOverflowError,
        DeviceError,
        Error,
        ExportError,
        GenerationError,
        ModelError,
        PromptError,
        SnapshotError,
        StreamError,
        TemplateError,
    )
    from ov_phi3.exporting.child import ProgressLine
    from ov_phi3.exporting.exporter import export
    from ov_phi3.exporting.flags import ExportFlags, RecipeName
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.metrics import Metrics
    from ov_phi3.generation.options import (
        GenerationOptions,
        LogitsProcessor,
        OnCancel,
        Overflow,
        Speculation,
        StopCriteria,
    )
    from ov_phi3.generation.results import Alternative, FinishReason, GenerationResult, Score, StreamChunk, TokenLogprob
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.layout import KVUsage
    from ov_phi3.kv.prefix_index import PrefixCache, PrefixIndex
    from ov_phi3.load_report import AdapterReport, DraftReport, LoadReport, ModelWarning
    from ov_phi3.loading import load
    from ov_phi3.many import OnProgress, Outcome, ReplyBatch, RequestOptions, Row
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.model.tokens import AddedToken
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix
    from ov_phi3.system.devices import DeviceInfo, devices
    from ov_phi3.system.machine import Machine
    from ov_phi3.text.jinja_template import JinjaTemplate
    from ov_phi3.text.messages import Message
    from ov_phi3.text.prompt import Prompt
    from ov_phi3.text.segments import Segment
    from ov_phi3.text.stop_strings import StopWatch
    from ov_phi3.text.stream_decoder import StreamDecoder
    from ov_phi3.text.template import ChatTemplate, Raw
    from ov_phi3.text.tokenizer import Ids, Tokenizer
    from ov_phi3.text.tool_calls import ToolCall
    from ov_phi3.text.tools import ToolChoice

_HOMES = {
    "adapters": ("Adapters",),
    "backends.protocol": (
        "Backend",
        "BackendName",
        "BackendReport",
        "Capabilities",
        "EngineReport",
        "Hypothesis",
        "Request",
        "TokenSink",
    ),
    "backends.words": ("TokenTexts",),
    "bench.measuring": ("measure",),
    "bench.prompts": ("random_prompt",),
    "bench.report": ("Report",),
    "bench.roofline": ("Roofline",),
    "bench.samples": (
        "ChatTurn",
        "Measurement",
    ),
    "bench.summary": ("Summary",),
    "chat": ("Chat",),
    "doctor": (
        "Check",
        "CheckStatus",
        "diagnose",
    ),
    "engine.stream": ("TokenStream",),
    "engine.worker": ("OnPrefill",),
    "errors": (
        "ClosedError",
        "ConfigError",
        "ContextOverflowError",
        "DeviceError",
        "Error",
        "ExportError",
        "GenerationError",
        "ModelError",
        "PromptError",
        "SnapshotError",
        "StreamError",
        "TemplateError",
    ),
    "exporting.child": ("ProgressLine",),
    "exporting.exporter": ("export",),
    "exporting.flags": (
        "ExportFlags",
        "RecipeName",
    ),
    "generation.config": ("GenerationConfig",),
    "generation.metrics": ("Metrics",),
    "generation.options": (
        "GenerationOptions",
        "LogitsProcessor",
        "OnCancel",
        "Overflow",
        "Speculation",
        "StopCriteria",
    ),
    "generation.results": (
        "Alternative",
        "FinishReason",
        "GenerationResult",
        "Score",
        "StreamChunk",
        "TokenLogprob",
    ),
    "kv.entry": ("KVEntry",),
    "kv.layout": ("KVUsage",),
    "kv.prefix_index": (
        "PrefixCache",
        "PrefixIndex",
    ),
    "load_report": (
        "AdapterReport",
        "DraftReport",
        "LoadReport",
        "ModelWarning",
    ),
    "loading": ("load",),
    "many": (
        "OnProgress",
        "Outcome",
        "ReplyBatch",
        "RequestOptions",
        "Row",
    ),
    "model.info": ("ModelInfo",),
    "model.tokens": ("AddedToken",),
    "pipeline": ("Pipeline",),
    "prefix": ("Prefix",),
    "system.devices": (
        "DeviceInfo",
        "devices",
    ),
    "system.machine": ("Machine",),
    "text.jinja_template": ("JinjaTemplate",),
    "text.messages": ("Message",),
    "text.prompt": ("Prompt",),
    "text.segments": ("Segment",),
    "text.stop_strings": ("StopWatch",),
    "text.stream_decoder": ("StreamDecoder",),
    "text.template": (
        "ChatTemplate",
        "Raw",
    ),
    "text.tokenizer": (
        "Ids",
        "Tokenizer",
    ),
    "text.tool_calls": ("ToolCall",),
    "text.tools": ("ToolChoice",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterReport",
    "Adapters",
    "AddedToken",
    "Alternative",
    "Backend",
    "BackendName",
    "BackendReport",
    "Capabilities",
    "Chat",
    "ChatTemplate",
    "ChatTurn",
    "Check",
    "CheckStatus",
    "ClosedError",
    "ConfigError",
    "ContextOverflowError",
    "DeviceError",
    "DeviceInfo",
    "DraftReport",
    "EngineReport",
    "Error",
    "ExportError",
    "ExportFlags",
    "FinishReason",
    "GenerationConfig",
    "GenerationError",
    "GenerationOptions",
    "GenerationResult",
    "Hypothesis",
    "Ids",
    "JinjaTemplate",
    "KVEntry",
    "KVUsage",
    "LoadReport",
    "LogitsProcessor",
    "Machine",
    "Measurement",
    "Message",
    "Metrics",
    "ModelError",
    "ModelInfo",
    "ModelWarning",
    "OnCancel",
    "OnPrefill",
    "OnProgress",
    "Outcome",
    "Overflow",
    "Pipeline",
    "Prefix",
    "PrefixCache",
    "PrefixIndex",
    "ProgressLine",
    "Prompt",
    "PromptError",
    "Raw",
    "RecipeName",
    "ReplyBatch",
    "Report",
    "Request",
    "RequestOptions",
    "Roofline",
    "Row",
    "Score",
    "Segment",
    "SnapshotError",
    "Speculation",
    "StopCriteria",
    "StopWatch",
    "StreamChunk",
    "StreamDecoder",
    "StreamError",
    "Summary",
    "TemplateError",
    "TokenLogprob",
    "TokenSink",
    "TokenStream",
    "TokenTexts",
    "Tokenizer",
    "ToolCall",
    "ToolChoice",
    "__version__",
    "devices",
    "diagnose",
    "export",
    "load",
    "measure",
    "random_prompt",
]


if not TYPE_CHECKING:  # with it, type checkers would take any name for one of ours

    def __getattr__(name: str) -> object:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module 'ov_phi3' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"ov_phi3.{home}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
