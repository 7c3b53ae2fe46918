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

        self.path = options["model"]
        self.model = llama_cpp.Llama(
            model_path=self.path,
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

    def traffic(self) -> dict[str, float]:
        """Bytes of all tensors but the embedding, of which a token reads one row, and of a KV cache in 16 bits."""
        from gguf import GGUFReader

        reader = GGUFReader(self.path)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        if "output.weight" in sizes:  # else the output layer uses the embedding's table
            del sizes["token_embd.weight"]

        def value(name: str) -> int:
            field = reader.get_field(f"{value_of('general.architecture')}.{name}")
            return int(field.contents())

        def value_of(name: str) -> str:
            return str(reader.get_field(name).contents())

        head = value("embedding_length") // value("attention.head_count")
        kv = 2 * value("block_count") * value("attention.head_count_kv") * head * 2
        return {"weight_bytes": sum(sizes.values()), "kv_bytes_per_token": kv}


if __name__ == "__main__":
    serve(LlamaCpp())
