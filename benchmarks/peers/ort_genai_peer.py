"""onnxruntime-genai on the CPU. The generator is reused while requests extend the previous one."""

from __future__ import annotations

import json
from typing import Any

from protocol import Stamp, serve


class OrtGenAI:
    """A model made by the builder of onnxruntime-genai."""

    modules = ("onnxruntime_genai",)
    packages = ("onnxruntime-genai", "onnxruntime")

    def load(self, options: dict[str, Any]) -> None:
        """Load with a number of threads."""
        import onnxruntime_genai

        config = onnxruntime_genai.Config(options["model"])
        threads = {"intra_op_num_threads": options["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = onnxruntime_genai.Model(config)
        self.window = options["window"]
        self.sequence: list[int] = []
        self.generator: Any = None

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """Append the new tokens, then generate one token at a time."""
        import onnxruntime_genai

        known = len(self.sequence)
        if self.generator is None or not known or ids[:known] != self.sequence:
            self.generator, known = None, 0  # frees the old cache first
            params = onnxruntime_genai.GeneratorParams(self.model)
            # min_length prevents end tokens from ending the reply.
            params.set_search_options(max_length=self.window, min_length=self.window, do_sample=False)
            self.generator = onnxruntime_genai.Generator(self.model, params)
        self.generator.append_tokens(ids[known:])
        self.sequence = list(ids)
        for _ in range(new_tokens):
            self.generator.generate_next_token()
            token = int(self.generator.get_next_tokens()[0])
            stamp([token])
            self.sequence.append(token)


if __name__ == "__main__":
    serve(OrtGenAI())
