"""The cookbook's code: `OVModelForCausalLM.generate` of optimum-intel, on the same exported files."""

from __future__ import annotations

from typing import Any

from protocol import Stamp, serve


class Optimum:
    """transformers' generation loop over OpenVINO."""

    modules = ("transformers", "optimum.intel")
    packages = ("optimum-intel", "transformers", "torch", "openvino")

    def load(self, options: dict[str, Any]) -> None:
        """Load as the cookbook does: tokenizer, then model, with its properties."""
        from optimum.intel import OVModelForCausalLM
        from transformers import AutoTokenizer

        properties = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}
        if options["device"] == "CPU":
            properties["INFERENCE_NUM_THREADS"] = str(options["threads"])
        self.tokenizer = AutoTokenizer.from_pretrained(options["model"])
        self.model = OVModelForCausalLM.from_pretrained(
            options["model"], device=options["device"], ov_config=properties
        )

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """One call of `generate`, with a streamer that records times."""
        import torch
        from transformers.generation.streamers import BaseStreamer

        class Streamer(BaseStreamer):  # type: ignore[misc]
            prompt_seen = False

            def put(self, value: Any) -> None:
                if self.prompt_seen:
                    stamp(value.tolist())
                self.prompt_seen = True

            def end(self) -> None:
                pass

        prompt = torch.tensor([ids])
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=Streamer(),
        )


if __name__ == "__main__":
    serve(Optimum())
