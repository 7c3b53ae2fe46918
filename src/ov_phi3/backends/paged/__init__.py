"""Our own engine: the exported graph with paged attention, and block tables, cache and scheduler in Python."""
