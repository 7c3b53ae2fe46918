"""`ov_phi3` as a user calls it: a for loop over the stream, in the consumer's thread."""

from __future__ import annotations

from typing import Any

from protocol import Stamp, serve


class OvPhi3:
    """The library of this repository."""

    modules = ("ov_phi3",)
    packages = ("ov-phi3", "openvino", "openvino-genai")

    def load(self, options: dict[str, Any]) -> None:
        """Load with the library's defaults and the given number of threads."""
        import ov_phi3

        properties = dict(options.get("ov_config", {}))
        if options["device"] == "CPU":
            properties["INFERENCE_NUM_THREADS"] = str(options["threads"])
        backend = options.get("backend", "llm_pipeline")
        self.pipe = ov_phi3.load(options["model"], options["device"], backend=backend, ov_config=properties or None)

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """Stream a reply."""
        for chunk in self.pipe.stream(ids, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False):
            if chunk.token_ids:
                stamp(chunk.token_ids)


if __name__ == "__main__":
    serve(OvPhi3())
