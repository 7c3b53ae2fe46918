"""The options of a reply and what comes of it: configuration, names in other APIs, results, metrics."""
