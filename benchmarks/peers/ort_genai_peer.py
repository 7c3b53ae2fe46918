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

        self.path = options["model"]
        config = onnxruntime_genai.Config(self.path)
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

    def traffic(self) -> dict[str, float]:
        """Bytes of all constants but tables of which rows are looked up, and of the KV cache in its inputs' type."""
        import onnx

        graph = onnx.load(f"{self.path}/model.onnx", load_external_data=False).graph
        tables = {node.input[0] for node in graph.node if node.op_type.startswith("Gather")}
        weights = sum(_size(tensor) for tensor in graph.initializer if tensor.name not in tables)
        caches = [value.type.tensor_type for value in graph.input if value.name.startswith("past_key_values.")]
        sizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
        per_token = [cache.shape.dim[1].dim_value * cache.shape.dim[3].dim_value for cache in caches]
        kv = sum(n * sizes[cache.elem_type] for n, cache in zip(per_token, caches, strict=True))
        return {"weight_bytes": weights, "kv_bytes_per_token": kv}


def _size(tensor: Any) -> int:
    """Bytes of a constant, in the graph's file or in the file beside it."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    return int(external["length"]) if external else tensor.ByteSize()


if __name__ == "__main__":
    serve(OrtGenAI())
