"""What `Pipeline`, `Chat` and `Prefix` share: one model's files, its tokenizer and its running engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ov_phi3.kv.fingerprint import fingerprint_of
from ov_phi3.text.prompt import encode_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.engine.engine import Engine
    from ov_phi3.load_report import AdapterReport
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.prompt import Prompt
    from ov_phi3.text.tokenizer import Tokenizer
    from ov_phi3.text.tools import Tools

__all__ = ["LoadedModel"]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        info: its directory's `ModelInfo`.
        tokenizer: its `Tokenizer`.
        engine: its running engine.
        adapters: its LoRA adapters.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    engine: Engine
    adapters: tuple[AdapterReport, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """What saved keys and values of this model depend on."""
        return fingerprint_of(self.info, self.tokenizer.template, [(one.sha256, one.factor) for one in self.adapters])

    def encode(
        self, prompt: Prompt, *, continue_final_message: bool = False, tools: Tools | None = None
    ) -> NDArray[np.int64]:
        """Encode a prompt: token ids, int64, shape [tokens]; the chat template is applied exactly once.

        Args:
            prompt: any kind of prompt.
            continue_final_message: end with the text of the assistant's last message, which the reply continues.
            tools: tools that the prompt describes.

        Raises:
            ConfigError: `continue_final_message` or `tools` with a prompt that is not messages.
            PromptError, TemplateError: a prompt that cannot become token ids.
            TypeError: none of the kinds of prompt.
        """
        return encode_prompt(
            prompt,
            self.tokenizer,
            self.info.vocab_size,
            continue_final_message=continue_final_message,
            tools=tools,
        )
