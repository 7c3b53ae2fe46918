"""Structured output: which tokens may come next, by a JSON schema, a regular expression or a grammar.

The grammar engine is llguidance (https://github.com/guidance-ai/llguidance), the package of the extra `structured`. It
gets the bytes of every token from this library's tokenizer, so that its view of the vocabulary is the decoder's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import ConfigError, GenerationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["Constraint", "ConstraintCompiler", "matches"]

_CACHED = 64  # compiled grammars
_ESCAPE = re.compile(r"\\\\|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")
_ENCODED = 4096  # texts


class Constraint:
    """The tokens that one reply may have.

    Args:
        matcher: an `LLMatcher` in its initial state.
        vocab_size: width of the logits.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self._ahead: deque[NDArray[np.bool_]] = deque()  # masks of the next positions
        self._assumed: deque[int] = deque()  # tokens between these positions

    @property
    def ended(self) -> bool:
        """Whether the structure is complete and cannot go on."""
        return bool(self._matcher.is_stopped())

    def prepare(self, tokens: Sequence[int]) -> None:
        """Compute ahead which tokens may come next, and which behind some next tokens as far as these are allowed.

        Meant for the time of a pass, which needs none of it. What fails here fails again in `allowed`, if it is asked.
        """
        self._ahead.clear()
        self._assumed.clear()
        ahead = self.fork() if tokens else self  # a wrong guess must not leave the matcher in an error state
        with contextlib.suppress(GenerationError):
            self._ahead.append(ahead._computed())
            for token in tokens:
                ahead.consume(token)
                mask = ahead._computed()
                self._assumed.append(token)
                self._ahead.append(mask)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next; bool, shape [vocabulary].

        Raises:
            GenerationError: the grammar has become too complex.
        """
        return self._ahead[0] if self._ahead else self._computed()

    def forced(self) -> int | None:
        """The only token that may come next; None if there are several.

        Where a structure leaves one text, llguidance allows one token, that of the tokenizer's own cut of the text. So
        this is the token that `allowed` has. Of a longer text only the first token is certain: the cut of the rest may
        change with what has been consumed.

        Raises:
            GenerationError: the grammar has become too complex.
        """
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return int(tokens[0]) if tokens else None

    def take_forced(self, most: int) -> list[int]:
        """Consume forced tokens, at most this many, and return them."""
        tokens: list[int] = []
        while len(tokens) < most and not self.ended and (token := self.forced()) is not None:
            self.consume(token)
            tokens.append(token)
        return tokens

    def _computed(self) -> NDArray[np.bool_]:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].view(np.bool_)

    def count_allowed(self, tokens: list[int]) -> int:
        """How many of some next tokens, from the first on, may come one after another; the state does not change."""
        count: int = self._matcher.validate_tokens(tokens)
        return max(0, count)

    def consume(self, token: int) -> None:
        """Note the token that was chosen.

        Raises:
            GenerationError: the token was not allowed, or the grammar has become too complex.
        """
        if self._assumed and self._assumed[0] == token:
            self._assumed.popleft()
            self._ahead.popleft()
        else:
            self._assumed.clear()
            self._ahead.clear()
        self._matcher.consume_token(token)
        self._check()

    def fork(self) -> Constraint:
        """A copy in the same state."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(
                f"the structured reply cannot go on: {_one_line(self._matcher.get_error())}. Use a simpler schema or "
                "grammar."
            )


class ConstraintCompiler:
    """Compiles the structures that configs ask for, and keeps the last ones.

    Args:
        tokenizer: the model's tokenizer.
        end_ids: the model's end tokens.
        vocab_size: width of the logits.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._vocab_size = vocab_size
        self._compile = functools.lru_cache(_CACHED)(self._compile_grammar)

    def start(self, config: GenerationConfig) -> Constraint | None:
        """A constraint for a reply; None if the config asks for no structure.

        Raises:
            ConfigError: llguidance is not installed, or does not accept the structure.
        """
        kind = config.structure
        if kind is None:
            return None
        matcher = self._compile(kind, str(getattr(config, kind)), bool(config.json_whitespace))
        return Constraint(matcher.deep_copy(), self._vocab_size)

    def _compile_grammar(self, kind: str, text: str, white_space: bool) -> Any:
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError(
                f"{kind} with backend='infer_request' needs the package llguidance (extra 'structured'): "
                "pip install 'llguidance>=1.9,<2'."
            )
        import llguidance

        try:
            grammar = _grammar(kind, text, white_space=white_space)
        except Exception as exc:  # llguidance's converter raises plain exceptions
            raise ConfigError(f"{kind} was not accepted: {_one_line(str(exc))}.") from exc
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"{kind} was not accepted: {_one_line(matcher.get_error())}.")
        try:
            # Now and not at the first token: a structure that nothing satisfies shows in its first mask.
            Constraint(matcher.deep_copy(), self._vocab_size).allowed()
        except GenerationError as exc:
            raise ConfigError(f"{kind} was not accepted: no reply satisfies it, or it is too complex.") from exc
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> Any:
        import llguidance

        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._end_ids, self._vocab_size))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=list(self._end_ids))


class _Vocabulary:
    """A vocabulary in the form that llguidance takes."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_ids[0] if end_ids else vocab_size - 1
        special = {*tokenizer.special_ids, *end_ids, *tokenizer.control_tokens.values()}
        self.special_token_ids = sorted(special)
        names = {token: name for name, token in tokenizer.control_tokens.items()}
        # Special tokens have no text: their names only tell them apart.
        self.tokens = [
            names.get(i, f"<|{i}|>").encode() if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)
        ]

        # The texts that are forced, such as keys, come again in every reply; encoding one takes as long as many masks.
        self._encode = functools.lru_cache(_ENCODED)(self._encode_continuation)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text that continues another one."""
        return self._encode(text.decode("utf-8") if isinstance(text, bytes) else text)

    def _encode_continuation(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode_continuation(text).tolist()
        return ids


def _grammar(kind: str, text: str, *, white_space: bool = False) -> str:
    """A structure in llguidance's own form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if kind == "json_schema":
        # Compact by default: small models fill a reply with white space if they may.
        return LLMatcher.grammar_from_json_schema(json.loads(text), defaults={"whitespace_flexible": white_space})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(any_to_lark(_ESCAPE.sub(_unescaped, text)))


def _unescaped(match: re.Match[str]) -> str:
    """An escape of one character without its zeros, which the conversion of EBNF (llguidance 1.9) would drop."""
    code = int(match[1] or match[2] or "d800", 16)
    if code > sys.maxunicode or 0xD800 <= code < 0xE000:
        return match[0]  # an escaped backslash, a half of a pair, or no character
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def matches(kind: str, text: str, reply: str) -> bool | None:
    """Whether a whole reply satisfies a regular expression or a grammar; None if llguidance is missing or cannot tell.

    Its matcher runs in linear time, with a vocabulary of single bytes.
    """
    if importlib.util.find_spec("llguidance") is None:
        return None
    import llguidance

    try:
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), _grammar(kind, text), log_level=0)
    except Exception:  # noqa: BLE001 - a syntax that only the other backend reads
        return None
    if matcher.is_error():
        return None
    data = list(reply.encode())
    consumed = matcher.try_consume_tokens(data)
    if matcher.is_error():
        return None  # too complex
    return bool(consumed == len(data) and matcher.is_accepting())


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".")
