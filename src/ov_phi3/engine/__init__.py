"""The running model between the facade and a backend: queue, prefill, LongRoPE, workers, streams."""
