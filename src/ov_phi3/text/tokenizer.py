"""Text to token ids and back, where text is data: only `Raw` and the template make control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.errors import Error, ModelError, PromptError, TemplateError
from ov_phi3.model.info import ModelInfo
from ov_phi3.text.detokenizer_graph import DetokenizerGraph
from ov_phi3.text.stream_decoder import StreamDecoder
from ov_phi3.text.template import ChatTemplate, Message, Raw, Segment
from ov_phi3.text.tokenizer_graph import TokenizerGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Tokenizer"]

# Unicode's White_Space property, which is what the tokenizers' own rstrip and lstrip go by; str.strip() would also
# take the four separators U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)

_MARK = "\u2581"


class Tokenizer:
    """A model's tokenizer: its exported graphs, and the layout its messages go through.

    Safe to use from several threads.

    Attributes:
        template: the `ChatTemplate` of `encode_messages`.
        control_tokens: text of every control (added) token -> its id.
        vocab_size: ids go from 0 to below this.
    """

    def __init__(
        self, model_dir: str | Path, template: ChatTemplate | None = None, *, vocab_size: int | None = None
    ) -> None:
        """Open the tokenizer of an exported model.

        Args:
            model_dir: directory with `openvino_tokenizer.xml` and `openvino_detokenizer.xml`.
            template: the chat layout; default: the one that the directory's own chat template describes.
            vocab_size: ids that the model can give, where that is known; most models have a few more than the
                tokenizer has texts for, which decode to nothing.

        Raises:
            ModelError: the files are missing or are not tokenizer graphs.
        """
        root = Path(model_dir)
        for name in ("openvino_tokenizer.xml", "openvino_detokenizer.xml"):
            if not (root / name).is_file():
                raise ModelError(f"{root / name} is missing. Export the model again: ov-phi3 export SOURCE OUTPUT.")
        if template is None:
            info = ModelInfo.from_dir(root)
            template, vocab_size = ChatTemplate.for_info(info), vocab_size or info.vocab_size
        self.template = template
        try:
            self._graph = TokenizerGraph(root / "openvino_tokenizer.xml")
            self._bytes = DetokenizerGraph(root / "openvino_detokenizer.xml")
        except Error:
            raise
        except Exception as exc:
            raise ModelError(f"the tokenizer files in {root} are damaged ({exc!r}). Export the model again.") from exc
        self.vocab_size = max(self._bytes.size, vocab_size or 0)
        self.control_tokens: dict[str, int] = dict(self._graph.added_tokens)
        self._control_ids = frozenset(self.control_tokens.values())
        names = "|".join(re.escape(t) for t in sorted(self.control_tokens, key=len, reverse=True))
        self._control = re.compile(f"({names})" if names else r"([^\s\S])")
        # SentencePiece's mark for a space: written in a text it would come back as a space, so it goes in as its bytes.
        self._mark = self._mark_bytes()
        byte_names = "<0x[0-9A-F]{2}>" if self._graph.byte_tokens else ""
        hazards = "|".join(n for n in (names, byte_names, _MARK if self._mark else "") if n)
        # Zero-width, so that names which overlap are all found.
        self._hazard = re.compile(f"(?={hazards})" if hazards else r"[^\s\S]")
        self._read_stripping()

    def __repr__(self) -> str:
        return (
            f"<Tokenizer {self.vocab_size} ids, {len(self.control_tokens)} control tokens, {self.template.name} layout>"
        )

    # -- to ids ------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text, shape [tokens], with nothing added.

        Control tokens in a plain string are text like any other; in `Raw` text they are control tokens.

        Raises:
            PromptError: the text holds a lone surrogate, which no encoding can carry.
            TypeError: not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if isinstance(text, Raw):
            pieces = self._control.split(text)
            return self.encode_segments([Segment(p, bool(i % 2)) for i, p in enumerate(pieces) if p])
        return self.encode_segments([Segment(text, False)])

    def encode_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> NDArray[np.int64]:
        """Token ids of a chat, shape [tokens], laid out by `template`.

        For messages without control-token text these are exactly the ids of the rendered string.

        Raises:
            TemplateError: messages that the layout cannot hold.
            PromptError: text that cannot be encoded.
        """
        return self.encode_segments(self.template.segments(messages, add_generation_prompt=add_generation_prompt))

    def encode_segments(self, segments: Iterable[Segment]) -> NDArray[np.int64]:
        """Token ids of control tokens and texts in turn, shape [tokens].

        Texts between two control tokens are one text to the tokenizer, as they are in the rendered string.

        Raises:
            TemplateError: a control token that this model does not have.
            PromptError: text that cannot be encoded.
        """
        controls, texts = self._joined(segments)
        encoded = self._encode_texts(texts)
        out: list[int] = []
        for control, ids in zip(controls, encoded, strict=True):
            if control is not None:
                out.append(control)
            out += ids
        return np.array(out, dtype=np.int64)

    def _joined(self, segments: Iterable[Segment]) -> tuple[list[int | None], list[str]]:
        """The segments as pairs of a control token and the text behind it, white space swallowed as the tokenizer
        does.
        """
        controls: list[int | None] = [None]
        texts = [""]
        for text, is_control in segments:
            if not is_control:
                _check_encodable(text)
                texts[-1] += text
                continue
            if text not in self.control_tokens:
                raise TemplateError(
                    f"this model's tokenizer has no control token {text!r}, which the {self.template.name} layout "
                    f"needs; it has {sorted(self.control_tokens)}. Give load() the template that fits."
                )
            token_id = self.control_tokens[text]
            if token_id in self._lstrip:
                texts[-1] = texts[-1].rstrip(_WHITE_SPACE)
            controls.append(token_id)
            texts.append("")
        return controls, [
            t.lstrip(_WHITE_SPACE) if c in self._rstrip else t for c, t in zip(controls, texts, strict=True)
        ]

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._graph.encode(texts)
        return [self._encode_guarded(t) if self._unsafe(t, i) else i for t, i in zip(texts, encoded, strict=True)]

    def _unsafe(self, text: str, ids: list[int]) -> bool:
        """Whether the graph may have taken a part of this text for a control token or a byte token."""
        return not self._control_ids.isdisjoint(ids) or self._hazard.search(text) is not None

    def _encode_guarded(self, text: str) -> list[int]:
        """Ids of a text that names control tokens, each name cut behind its first character so that it is not seen
        whole.
        """
        cuts = [m.start() + 1 for m in self._hazard.finditer(text)]
        out = self._encode_cut(text, cuts)
        if not self._control_ids.isdisjoint(out):
            # A normalizer made a name out of something else: then no two characters may meet.
            out = self._encode_cut(text, list(range(1, len(text))))
        if not self._control_ids.isdisjoint(out):
            raise PromptError(f"{text[:80]!r} cannot be encoded without making a control token of it.")
        return out

    def _encode_cut(self, text: str, cuts: list[int]) -> list[int]:
        bounds = [0, *cuts, len(text)]
        pieces = [p for a, b in pairwise(bounds) if a < b for p in self._around_marks(text[a:b])]
        plain = ["" if self._mark and p == _MARK else p for p in pieces]
        encoded = self._graph.encode(plain[:1]) + self._graph.encode(plain[1:], continues=True)
        marked = [self._mark if p == _MARK and self._mark else ids for p, ids in zip(pieces, encoded, strict=True)]
        return [i for ids in marked for i in ids]

    def _around_marks(self, text: str) -> list[str]:
        return [p for p in re.split(f"({_MARK})", text) if p] if self._mark else [text]

    def _mark_bytes(self) -> list[int]:
        """Ids of the byte tokens that spell the mark, or nothing where a mark in a text comes back as it is."""
        if not self._graph.byte_tokens or _MARK in self._text_of_graph(_MARK):
            return []
        singles = {self._bytes.token_bytes(i): i for i in range(512)}
        spelled = [singles.get(bytes([b])) for b in _MARK.encode()]
        return [i for i in spelled if i is not None] if None not in spelled else []

    def _text_of_graph(self, text: str) -> str:
        return b"".join(self._bytes.token_bytes(i) for i in self._graph.encode([text])[0]).decode("utf-8", "replace")

    def _read_stripping(self) -> None:
        """Which control tokens swallow white space behind or before them, found by asking the graph."""
        names = list(self.control_tokens)
        behind = self._graph.encode([n + " " for n in names]) if names else []
        before = self._graph.encode([" " + n for n in names]) if names else []
        ids = [self.control_tokens[n] for n in names]
        self._rstrip = frozenset(i for i, got in zip(ids, behind, strict=True) if got == [i])
        self._lstrip = frozenset(i for i, got in zip(ids, before, strict=True) if got == [i])

    # -- to text -----------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, shape [tokens]; special tokens are left out unless asked for.

        Raises:
            PromptError: an id outside the vocabulary.
            TypeError: not a list or 1-D array of whole numbers.
        """
        checked = as_ids(ids, self.vocab_size)
        decoder = self.stream_decoder(skip_special_tokens=skip_special_tokens)
        return decoder.add(checked.tolist()) + decoder.flush()

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids as they come; what it gives adds up to `decode` of all of them."""
        return StreamDecoder(
            self._bytes.token_bytes,
            skipped=self._bytes.skipped if skip_special_tokens else (),
            strips_space=self._bytes.strips_space,
        )


def as_ids(ids: object, vocab_size: int) -> NDArray[np.int64]:
    """Token ids as an int64 array of shape [tokens], checked.

    Raises:
        PromptError: an id outside the vocabulary, or an array that is not one-dimensional.
        TypeError: anything but whole numbers.
    """
    if isinstance(ids, (str, bytes, bytearray, memoryview)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise TypeError(f"token ids must be a list or a 1-D array of whole numbers, not {type(ids).__name__}")
    if isinstance(ids, Sequence):
        _check_range((i for i in ids if isinstance(i, int)), vocab_size)  # numpy makes floats of ints too large for it
    try:
        array = np.asarray(ids)
    except ValueError as exc:
        raise PromptError("token ids must be one flat list, not lists of different lengths.") from exc
    if array.ndim != 1:
        raise PromptError(f"token ids must be one flat list or a 1-D array, not of shape {list(array.shape)}.")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"token ids must be whole numbers, not {array.dtype} (first: {array.flat[0]!r})")
    if array.size:
        _check_range((int(array.min()), int(array.max())), vocab_size)
    return array.astype(np.int64)


def _check_range(ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise PromptError(f"token id {wrong} is outside the vocabulary; ids go from 0 to {vocab_size - 1}.")


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise PromptError(
            f"the text holds a lone surrogate, {text[exc.start]!r} at character {exc.start}, which is half a "
            "character. Decode the bytes it came from with errors='replace'."
        ) from exc
