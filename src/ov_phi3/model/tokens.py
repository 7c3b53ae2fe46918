"""Added tokens, end tokens and the family of a model, read from the tokenizer's files and resolved to ids."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ov_phi3.errors import ModelError
from ov_phi3.model.config import JsonFile, read_json, read_text
from ov_phi3.model.ir import IrGraph, IrSummary

__all__ = ["AddedToken", "TokenizerFiles", "end_token_ids", "family_of"]

_FAMILY_END_TOKENS: Mapping[str, Mapping[int, str]] = {
    "phi-3": {32000: "<|endoftext|>", 32001: "<|assistant|>", 32007: "<|end|>"},
    "phi-4-mini": {199999: "<|endoftext|>", 200020: "<|end|>"},
    "phi-4": {100257: "<|endoftext|>", 100265: "<|im_end|>"},
}
"""End tokens of the published models' `generation_config.json`; "phi-3" covers all models with its vocabulary."""

_MESSAGE_ENDS = ("<|end|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that the tokenizer finds in a text before it splits the rest.

    Attributes:
        id: token id.
        content: the token's text.
        special: left out when decoding without special tokens.
        lstrip: the token includes white space before it.
        rstrip: the token includes white space after it.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class TokenizerFiles:
    """`tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a directory; all are optional.

    The tokenizer's graph, `openvino_tokenizer.xml`, has most of it too, and is read where they are missing.
    """

    def __init__(self, directory: Path, names: Mapping[str, int]) -> None:
        self._json = directory / "tokenizer.json" if "tokenizer.json" in names else None
        self._jinja = directory / "chat_template.jinja" if "chat_template.jinja" in names else None
        self._graph = directory / "openvino_tokenizer.xml" if "openvino_tokenizer.xml" in names else None
        config = directory / "tokenizer_config.json"
        self._config = read_json(config) if config.name in names else JsonFile(config, {})

    @property
    def known(self) -> bool:
        """Whether the directory describes its tokens."""
        return self._described or bool(self.added)

    @property
    def _described(self) -> bool:
        return self._json is not None or bool(self._config.data)

    @cached_property
    def added(self) -> tuple[AddedToken, ...]:
        """The added tokens, sorted by id; `tokenizer.json` takes precedence over `tokenizer_config.json`."""
        if not self._described:
            return self._from_graph()
        tokens = {token.id: token for token in self._from_config()}
        tokens.update((token.id, token) for token in self._from_json())
        return tuple(tokens[id_] for id_ in sorted(tokens))

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source: `chat_template.jinja` (transformers 5) or the entry in `tokenizer_config.json` (before)."""
        if self._jinja is not None:
            return read_text(self._jinja)
        value = self._config.data.get("chat_template")
        if isinstance(value, list):
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        if value is not None and not isinstance(value, str):
            raise self._config.error(
                "chat_template", value, "a Jinja template, or a list with a template named 'default'"
            )
        return value or (None if self._described else self._summary("chat_template"))

    def graph_id(self, key: str) -> int | None:
        """The id under a key, such as `eos_token_id`, that the converter stored in the tokenizer's graph."""
        value = self._summary(key) or ""
        return int(value) if re.fullmatch(r"\d{1,9}", value) else None

    def text(self, key: str) -> str | None:
        """The text of a token in `tokenizer_config.json`, by its key, such as `eos_token`."""
        value = self._config.data.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise self._config.error(key, value, "a token's text")
        if value is None and not self._described:
            number = self.graph_id(f"{key}_id")
            return next((token.content for token in self.added if token.id == number), None)
        return value

    def id_of(self, text: str | None) -> int | None:
        """The id of an added token, or else of a token of the vocabulary; None if the text is neither."""
        for token in self.added:
            if token.content == text:
                return token.id
        return self._vocabulary().get(text) if text is not None else None

    def _summary(self, key: str) -> str | None:
        if self._graph is None:
            return None
        return IrSummary.read(self._graph.parent, self._graph.stem).info(key) or None

    def _from_graph(self) -> tuple[AddedToken, ...]:
        """The added tokens of the graph: the last inputs of its BPE operation, begins, ends, characters and ids."""
        if self._graph is None:
            return ()
        graph = IrGraph.read(self._graph)
        bpe = next(graph.layers("BPETokenizer"), None)
        if bpe is None or len(bpe.inputs) not in (15, 18):
            return ()
        try:
            begins, ends, characters, ids = (graph.constant_bytes(output) for output in bpe.inputs[-4:])
            bounds = zip(_int32(begins), _int32(ends), _int32(ids), strict=True)
            tokens = [AddedToken(i, characters[begin:end].decode("utf-8"), special=True) for begin, end, i in bounds]
        except (OSError, ValueError, struct.error) as error:
            raise ModelError(f"{self._graph} is damaged: its added tokens cannot be read ({error}).") from error
        return tuple(sorted(tokens, key=lambda token: token.id))

    def _from_config(self) -> Iterable[AddedToken]:
        decoder = self._config.data.get("added_tokens_decoder") or {}
        try:
            return [_added_token({**entry, "id": int(id_)}) for id_, entry in decoder.items()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._config.path}: added_tokens_decoder cannot be read ({error!r}).") from error

    def _from_json(self) -> Iterable[AddedToken]:
        if self._json is None:
            return []
        text = read_text(self._json)
        # The list is near the top of a file of many megabytes; the rest is not parsed.
        key = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
        if key is None:
            read_json(self._json)  # without the list, it still has to be a JSON file
            return []
        try:
            entries, _ = json.JSONDecoder().raw_decode(text, key.end())
            return [_added_token(entry) for entry in entries]
        except json.JSONDecodeError as error:
            raise ModelError(
                f"{self._json} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
                "copy or export it again."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._json}: added_tokens cannot be read ({error!r}).") from error

    def _vocabulary(self) -> Mapping[str, int]:
        model = read_json(self._json).data.get("model") if self._json is not None else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        return vocabulary if isinstance(vocabulary, dict) else {}


def _int32(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}i", data)


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    id_, content = entry["id"], entry["content"]
    if isinstance(id_, bool) or not isinstance(id_, int) or not isinstance(content, str):
        raise TypeError(f"id {id_!r}, content {content!r}")
    return AddedToken(id_, content, bool(entry.get("special")), bool(entry.get("lstrip")), bool(entry.get("rstrip")))


def family_of(added: Iterable[AddedToken], chat_template: str | None) -> str:
    """The family whose vocabulary and chat template a model has.

    "phi-3", "phi-3-april-2024" (no system message), "phi-3.5", "phi-4-mini", "phi-4"; "phi3-compatible" for the same
    architecture with another vocabulary. The ids of the control tokens decide. Between families with the same
    vocabulary, the chat template decides.
    """
    texts = {token.id: token.content for token in added}
    if texts.get(200020) == "<|end|>":
        return "phi-4-mini"
    if texts.get(100265) == "<|im_end|>":
        return "phi-4"
    if (texts.get(32007), texts.get(32010)) != ("<|end|>", "<|user|>"):
        return "phi3-compatible"
    if chat_template and re.search(r"'system'\s+and\s+message\[", chat_template):
        return "phi-3.5"
    names_system = not chat_template or re.search(r"['\"]system['\"]|message\['role'\] \+", chat_template)
    return "phi-3" if names_system else "phi-3-april-2024"


def end_token_ids(added: Iterable[AddedToken], family: str, chat_template: str | None) -> set[int]:
    """Ids that end a reply in addition to those of the configs.

    These are the family's end tokens, if the tokenizer has the same text at the same id, and the token that ends a
    message in the chat template.
    """
    vocabulary = "phi-3" if family.startswith("phi-3") else family
    table = _FAMILY_END_TOKENS.get(vocabulary, {})
    ends = [text for text in _MESSAGE_ENDS if text in (chat_template or "")]
    return {token.id for token in added if token.content in ends or table.get(token.id) == token.content}
