"""Raw `openvino_genai.LLMPipeline`: `generate` with a streamer that only records times."""

from __future__ import annotations

from typing import Any

from protocol import Stamp, serve


class GenAI:
    """OpenVINO GenAI, on which this library is built."""

    modules = ("openvino", "openvino_genai")
    packages = ("openvino", "openvino-genai")

    def load(self, options: dict[str, Any]) -> None:
        """Load with the cookbook's properties."""
        import openvino_genai

        properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
        if options["device"] == "CPU":
            properties["INFERENCE_NUM_THREADS"] = str(options["threads"])
        self.pipe = openvino_genai.LLMPipeline(options["model"], options["device"], **properties)

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """One call of `generate`."""
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.apply_chat_template = new_tokens, True, False

        class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                stamp(token if isinstance(token, list) else [token])
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self.pipe.generate(openvino.Tensor([ids]), config, Streamer())


if __name__ == "__main__":
    serve(GenAI())
