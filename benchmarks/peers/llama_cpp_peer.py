"""llama.cpp through `llama-cpp-python`, with flash attention, which is faster here than without."""

from __future__ import annotations

from itertools import islice
from typing import Any

from protocol import Stamp, serve


class LlamaCpp:
    """A GGUF file on the CPU. llama.cpp reuses the longest common prefix with the previous request by itself."""

    modules = ("llama_cpp",)
    packages = ("llama-cpp-python",)

    def load(self, options: dict[str, Any]) -> None:
        """Load with a context window for the longest request."""
        import llama_cpp

        self.model = llama_cpp.Llama(
            model_path=options["model"],
            n_ctx=options["window"],
            n_batch=options["window"],
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            flash_attn=True,
            verbose=False,
        )

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """Take ids from the generator of its high-level class."""
        for token in islice(self.model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), new_tokens):
            stamp([token])


if __name__ == "__main__":
    serve(LlamaCpp())
