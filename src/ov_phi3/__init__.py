"""Run Phi-3 class language models on Intel hardware with OpenVINO GenAI.

Importing this package imports neither openvino nor numpy: every name below is loaded when it is first used.
"""

from __future__ import annotations

from ov_phi3._version import __version__

TYPE_CHECKING = False  # type checkers take it for typing's, whose import would take most of this one's time
if TYPE_CHECKING:
    from typing import Any

    from ov_phi3.backends.protocol import Backend, BackendReport, EngineReport, Request
    from ov_phi3.bench.measuring import measure
    from ov_phi3.bench.prompts import random_prompt
    from ov_phi3.bench.report import Report
    from ov_phi3.bench.roofline import Roofline
    from ov_phi3.bench.samples import ChatTurn, Measurement
    from ov_phi3.bench.summary import Summary
    from ov_phi3.chat import Chat
    from ov_phi3.doctor import Check, diagnose
    from ov_phi3.engine.stream import TokenStream
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
    from ov_phi3.exporting.exporter import export
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.generation.metrics import Metrics
    from ov_phi3.generation.results import Alternative, GenerationResult, Score, StreamChunk, TokenLogprob
    from ov_phi3.kv.layout import KVUsage
    from ov_phi3.kv.prefix_index import PrefixCache
    from ov_phi3.load_report import LoadReport, ModelWarning
    from ov_phi3.loading import load
    from ov_phi3.many import ReplyBatch
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix
    from ov_phi3.system.devices import DeviceInfo, devices
    from ov_phi3.system.machine import Machine
    from ov_phi3.text.template import ChatTemplate, Raw
    from ov_phi3.text.tokenizer import Tokenizer
    from ov_phi3.text.tool_calls import ToolCall

_HOMES = {
    "backends.protocol": ("Backend", "BackendReport", "EngineReport", "Request"),
    "chat": ("Chat",),
    "system.devices": ("DeviceInfo", "devices"),
    "doctor": ("Check", "diagnose"),
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
    "exporting.exporter": ("export",),
    "generation.config": ("GenerationConfig",),
    "kv.layout": ("KVUsage",),
    "kv.prefix_index": ("PrefixCache",),
    "load_report": ("LoadReport", "ModelWarning"),
    "loading": ("load",),
    "many": ("ReplyBatch",),
    "system.machine": ("Machine",),
    "bench.measuring": ("measure",),
    "bench.prompts": ("random_prompt",),
    "generation.metrics": ("Metrics",),
    "model.info": ("ModelInfo",),
    "pipeline": ("Pipeline",),
    "prefix": ("Prefix",),
    "bench.report": ("Report",),
    "bench.samples": ("ChatTurn", "Measurement"),
    "bench.summary": ("Summary",),
    "generation.results": ("Alternative", "GenerationResult", "Score", "StreamChunk", "TokenLogprob"),
    "bench.roofline": ("Roofline",),
    "engine.stream": ("TokenStream",),
    "text.template": ("ChatTemplate", "Raw"),
    "text.tokenizer": ("Tokenizer",),
    "text.tool_calls": ("ToolCall",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Alternative",
    "Backend",
    "BackendReport",
    "Chat",
    "ChatTemplate",
    "ChatTurn",
    "Check",
    "ClosedError",
    "ConfigError",
    "ContextOverflowError",
    "DeviceError",
    "DeviceInfo",
    "EngineReport",
    "Error",
    "ExportError",
    "GenerationConfig",
    "GenerationError",
    "GenerationResult",
    "KVUsage",
    "LoadReport",
    "Machine",
    "Measurement",
    "Metrics",
    "ModelError",
    "ModelInfo",
    "ModelWarning",
    "Pipeline",
    "Prefix",
    "PrefixCache",
    "PromptError",
    "Raw",
    "ReplyBatch",
    "Report",
    "Request",
    "Roofline",
    "Score",
    "SnapshotError",
    "StreamChunk",
    "StreamError",
    "Summary",
    "TemplateError",
    "TokenLogprob",
    "TokenStream",
    "Tokenizer",
    "ToolCall",
    "__version__",
    "devices",
    "diagnose",
    "export",
    "load",
    "measure",
    "random_prompt",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ov_phi3' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"ov_phi3.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
