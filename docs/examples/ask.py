"""Ask the demo model that `python scripts/quickstart.py` has put into `model/demo`; run it in the checkout."""

import ov_phi3

with ov_phi3.load("model/demo") as pipe:
    stream = pipe.stream("What is the capital of France?", max_new_tokens=64)
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    print()
    print(stream.result.finish_reason, "after", stream.result.metrics)
