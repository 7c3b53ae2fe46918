"""The KV cache without an engine: sizes, which tokens are cached, keys and values, the file they are saved in."""
