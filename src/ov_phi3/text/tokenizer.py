"""Text to token ids and back. Text is data: only `Raw` and the chat template produce control tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ov_phi3.errors import Error, ModelError, PromptError, TemplateError
from ov_phi3.model.info import ModelInfo
from ov_phi3.model.ir import IrSummary
from ov_phi3.text.detokenizer_graph import DetokenizerGraph
from ov_phi3.text.messages import Message
from ov_phi3.text.segments import Raw, Segment, check_encodable
from ov_phi3.text.stream_decoder import StreamDecoder
from ov_phi3.text.template import ChatTemplate
from ov_phi3.text.tokenizer_graph import TokenizerGraph

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Ids", "Tokenizer", "as_ids"]

Ids: TypeAlias = Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]
"""Token ids, shape [tokens]."""

# Unicode's White_Space property, which the tokenizers' rstrip and lstrip use. str.strip() would also remove the four
# separators U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)

_MARK = "\u2581"  # SentencePiece's mark for a space
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class Tokenizer:
    """A model's tokenizer: its exported graphs and its chat template.

    Safe to use from several threads.

    Attributes:
        template: the `ChatTemplate` that `encode_messages` applies.
        control_tokens: text of every control (added) token -> its id.
        vocab_size: ids go from 0 to below this.
    """

    def __init__(
        self, model_dir: str | Path, template: ChatTemplate | None = None, *, vocab_size: int | None = None
    ) -> None:
        """Open the tokenizer of an exported model.

        Args:
            model_dir: directory with `openvino_tokenizer.xml` and `openvino_detokenizer.xml`.
            template: the chat template; default: `ChatTemplate.for_model(model_dir)`.
            vocab_size: number of ids that the model can generate, if known. Most models have a few more ids than the
                tokenizer; those decode to nothing.

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
        try:
            self._graph = TokenizerGraph(root / "openvino_tokenizer.xml")
            self._bytes = DetokenizerGraph(root / "openvino_detokenizer.xml")
        except Error:
            raise
        except Exception as exc:
            release = IrSummary.read(root, "openvino_tokenizer").info("openvino_tokenizers_version")
            raise ModelError(
                f"the tokenizer files in {root} are damaged, or of an old release ({exc!r}). They were written by "
                f"openvino-tokenizers {release or 'of an unknown version'}. Convert the tokenizer again with "
                f"`convert_tokenizer SOURCE --with-detokenizer -o {root}`, or export the model again."
            ) from exc
        self.vocab_size = max(self._bytes.size, vocab_size or 0)
        self.control_tokens: dict[str, int] = dict(self._graph.added_tokens)
        self.template = template.with_names(tuple(self.control_tokens))
        self._control_ids = frozenset(self.control_tokens.values())
        names = "|".join(re.escape(text) for text in sorted(self.control_tokens, key=len, reverse=True))
        self._control = re.compile(f"({names})" if names else r"([^\s\S])")
        # A mark in a text would decode to a space, so it is encoded as its bytes.
        self._mark_ids = self._byte_tokens_of_mark()
        byte_names = "<0x[0-9A-F]{2}>" if self._graph.byte_tokens else ""
        unsafe = "|".join(pattern for pattern in (names, byte_names, _MARK if self._mark_ids else "") if pattern)
        # Zero-width, so that overlapping names are all found.
        self._unsafe = re.compile(f"(?={unsafe})" if unsafe else r"[^\s\S]")
        self._lstrip, self._rstrip = self._find_stripping_tokens()
        self._header: tuple[ChatTemplate, tuple[int, ...]] | None = None

    def __repr__(self) -> str:
        controls = f"{len(self.control_tokens)} control tokens"
        return f"<Tokenizer {self.vocab_size} ids, {controls}, {self.template.name} chat template>"

    # -- to ids ------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text, without adding anything: token ids, int64, shape [tokens].

        Control-token names in a plain string are encoded as text; in `Raw` text they become control tokens.

        Raises:
            PromptError: the text holds a lone surrogate, which UTF-8 cannot encode.
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if isinstance(text, Raw):
            parts = self._control.split(text)
            return self.encode_segments([Segment(part, bool(i % 2)) for i, part in enumerate(parts) if part])
        return self.encode_segments([Segment(text, False)])

    def encode_messages(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> NDArray[np.int64]:
        """Encode a chat with `template`: token ids, int64, shape [tokens].

        For messages without control-token text these are exactly the ids of the rendered string.

        Args:
            messages: the chat.
            add_generation_prompt: end with the assistant's header, for a reply; also behind an assistant's message,
                which `Pipeline` refuses.
            continue_final_message: end with the text of the last message, an assistant's, for a reply that goes on
                with it.

        Raises:
            TemplateError: the template does not accept the messages, or they do not end with the assistant's and
                `continue_final_message` is set.
            PromptError: a text cannot be encoded.
        """
        return self.encode_segments(
            self.template.segments(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        )

    def encode_segments(self, segments: Iterable[Segment]) -> NDArray[np.int64]:
        """Encode the segments of a chat template: token ids, int64, shape [tokens].

        Texts between two control tokens are joined before they are encoded, as in the rendered string.

        Raises:
            TemplateError: the model does not have a control token.
            PromptError: a text cannot be encoded.
        """
        controls, texts = self._pair(segments)
        ids: list[int] = []
        for control, text_ids in zip(controls, self._encode_texts(texts), strict=True):
            if control is not None:
                ids.append(control)
            ids += text_ids
        return np.array(ids, dtype=np.int64)

    def _pair(self, segments: Iterable[Segment]) -> tuple[list[int | None], list[str]]:
        """Pair each control token with the text behind it; strip white space where the tokenizer does."""
        controls: list[int | None] = [None]
        texts = [""]
        for text, is_control in segments:
            if not is_control:
                check_encodable(text)
                texts[-1] += text
                continue
            if text not in self.control_tokens:
                raise TemplateError(
                    f"this model's tokenizer has no control token {text!r}, which the {self.template.name} chat "
                    f"template needs; it has {sorted(self.control_tokens)}. Pass the model's own template to load()."
                )
            token_id = self.control_tokens[text]
            if token_id in self._lstrip:
                texts[-1] = texts[-1].rstrip(_WHITE_SPACE)
            controls.append(token_id)
            texts.append("")
        return controls, [
            text.lstrip(_WHITE_SPACE) if control in self._rstrip else text
            for control, text in zip(controls, texts, strict=True)
        ]

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._graph.encode(texts)
        return [
            self._encode_split(text) if self._is_unsafe(text, ids) else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _is_unsafe(self, text: str, ids: list[int]) -> bool:
        """Whether the graph may have read a part of this text as a control token, a byte token or a mark."""
        return not self._control_ids.isdisjoint(ids) or self._unsafe.search(text) is not None

    def _encode_split(self, text: str) -> list[int]:
        """Encode a text that names control tokens. It is split behind the first character of each name, so that the
        graph never sees a whole name.
        """
        ids = self._encode_parts(text, [match.start() + 1 for match in self._unsafe.finditer(text)])
        if not self._control_ids.isdisjoint(ids):
            # A normalizer turned other text into a name: encode every character by itself.
            ids = self._encode_parts(text, list(range(1, len(text))))
        if not self._control_ids.isdisjoint(ids):
            raise PromptError(f"{text[:80]!r} cannot be encoded without producing a control token.")
        return ids

    def _encode_parts(self, text: str, splits: list[int]) -> list[int]:
        """Encode the parts of a text between the positions `splits` one by one, and marks as their bytes."""
        bounds = [0, *splits, len(text)]
        parts = [part for a, b in pairwise(bounds) if a < b for part in self._split_at_marks(text[a:b])]
        is_mark = [bool(self._mark_ids) and part == _MARK for part in parts]
        texts = ["" if mark else part for mark, part in zip(is_mark, parts, strict=True)]
        encoded = self._graph.encode(texts[:1]) + self._graph.encode(texts[1:], continues=True)
        return [
            token_id
            for mark, ids in zip(is_mark, encoded, strict=True)
            for token_id in (self._mark_ids if mark else ids)
        ]

    def _split_at_marks(self, text: str) -> list[str]:
        return [part for part in re.split(f"({_MARK})", text) if part] if self._mark_ids else [text]

    def _byte_tokens_of_mark(self) -> list[int]:
        """Ids of the byte tokens of the mark's UTF-8 form; empty if a mark in a text decodes to itself."""
        if not self._graph.byte_tokens or _MARK in self._round_trip(_MARK):
            return []
        id_of_byte = {self._bytes.token_bytes(i): i for i in range(512)}
        ids = [id_of_byte.get(bytes([byte])) for byte in _MARK.encode()]
        return [i for i in ids if i is not None] if None not in ids else []

    def _round_trip(self, text: str) -> str:
        return b"".join(self._bytes.token_bytes(i) for i in self._graph.encode([text])[0]).decode("utf-8", "replace")

    def _find_stripping_tokens(self) -> tuple[frozenset[int], frozenset[int]]:
        """Control tokens that remove the white space before them, and behind them; found by encoding both cases."""
        names = list(self.control_tokens)
        before = self._graph.encode([" " + name for name in names]) if names else []
        behind = self._graph.encode([name + " " for name in names]) if names else []
        token_ids = [self.control_tokens[name] for name in names]
        lstrip = frozenset(token for token, ids in zip(token_ids, before, strict=True) if ids == [token])
        rstrip = frozenset(token for token, ids in zip(token_ids, behind, strict=True) if ids == [token])
        return lstrip, rstrip

    def encode_continuation(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text that continues another one: without the mark that SentencePiece puts in front of a text.

        Control tokens in the text are text. Returns ids of shape [tokens].

        Raises:
            PromptError: the text contains a lone surrogate.
        """
        check_encodable(text)
        ids = self._graph.encode([text], continues=True)[0]
        if self._is_unsafe(text, ids):  # then no two characters may meet
            singles = self._graph.encode(list(text), continues=True)
            ids = [
                i
                for character, single in zip(text, singles, strict=True)
                for i in (self._mark_ids if self._mark_ids and character == _MARK else single)
            ]
        return np.array(ids, dtype=np.int64)

    # -- to text -----------------------------------------------------------------------------------------------------

    def decode(
        self,
        ids: Ids,
        *,
        skip_special_tokens: bool = True,
        after: Ids = (),
        final: bool = True,
    ) -> str:
        """Decode token ids, shape [tokens].

        Args:
            ids: a list or 1-D array.
            skip_special_tokens: leave special tokens out of the text.
            after: ids that these continue, such as a prompt, or a prompt and the first part of its reply. The result
                is what `ids` add to their text.
            final: the text ends with these ids. False leaves out a last character that is not complete, instead of
                writing U+FFFD, so that `decode(a, final=False) + decode(b, after=a)` equals `decode(a + b)`.

        Raises:
            PromptError: an id is outside the vocabulary.
            TypeError: `ids` is not a list or 1-D array of whole numbers.
        """
        checked = as_ids(ids, self.vocab_size)
        decoder = self.stream_decoder(
            skip_special_tokens=skip_special_tokens, after=as_ids(after, self.vocab_size) if len(after) else ()
        )
        return decoder.add(checked.tolist()) + decoder.flush(final=final)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are left out of decoded text."""
        return self._bytes.skipped

    def control_ids(self, texts: Iterable[str]) -> dict[int, str]:
        """The texts that are exactly the name of a control token, by its id."""
        return {self.control_tokens[text]: text for text in texts if text in self.control_tokens}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds inside a text; b"" for ids that only pad the vocabulary."""
        return self._bytes.token_bytes(token_id)

    def stream_decoder(
        self, *, skip_special_tokens: bool = True, keep_space: bool = False, after: Ids = ()
    ) -> StreamDecoder:
        """An incremental decoder; its results, joined, equal `decode` of all ids.

        Args:
            skip_special_tokens: leave out the text of special tokens.
            keep_space: keep a space at the start that `decode` removes with SentencePiece's vocabularies.
            after: ids that the decoded ones continue, see `decode`.
        """
        skipped = self._bytes.skipped if skip_special_tokens else frozenset()
        return StreamDecoder(
            self._bytes.token_bytes,
            skipped=skipped,
            strips_space=self._bytes.strips_space and not keep_space,
            before=self._text_before(after, skipped),
        )

    def _text_before(self, ids: Ids, skipped: Collection[int]) -> bytes:
        """The last bytes of the text that continues behind these ids; none if a reply begins there."""
        data = b""
        header = self._reply_header() if len(ids) else ()
        for end in range(len(ids), 0, -1):
            if len(data) >= _LONGEST_CHARACTER or _ends_with(ids, end, header):
                break
            token_id = int(ids[end - 1])
            data = (b"" if token_id in skipped else self._bytes.token_bytes(token_id)) + data
        return data

    def _reply_header(self) -> tuple[int, ...]:
        """The ids at the end of every prompt that a reply begins behind, from their last control token on."""
        template, header = self._header or (None, ())
        if template is not self.template:
            try:
                one, other = (self.encode_messages([{"role": "user", "content": text}]).tolist() for text in ("7", "b"))
            except TemplateError:
                one = other = []  # such messages are refused before anything is generated
            common = next((n for n in range(min(len(one), len(other))) if one[-1 - n] != other[-1 - n]), 0)
            control = next((n for n in range(1, common + 1) if one[-n] in self._control_ids), common)
            header = tuple(one[len(one) - control :])
            self._header = (self.template, header)
        return header


def _ends_with(ids: Ids, end: int, header: Sequence[int]) -> bool:
    """Whether the first `end` ids end with a header."""
    count = len(header)
    return 0 < count <= end and all(int(ids[end - count + i]) == token_id for i, token_id in enumerate(header))


def as_ids(ids: object, vocab_size: int) -> NDArray[np.int64]:
    """Check token ids and return them as an int64 array, shape [tokens].

    Raises:
        PromptError: an id is outside the vocabulary, or the array is not one-dimensional.
        TypeError: `ids` holds anything but whole numbers.
    """
    if isinstance(ids, (str, bytes, bytearray, memoryview)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise TypeError(f"token ids must be a list or a 1-D array of whole numbers, not {type(ids).__name__}")
    if isinstance(ids, Sequence):
        _check_range((i for i in ids if isinstance(i, int)), vocab_size)  # numpy turns too large integers into floats
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
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise PromptError(f"token id {outside} is outside the vocabulary; ids go from 0 to {vocab_size - 1}.")
