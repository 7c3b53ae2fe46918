"""Options of a reply, their names in other APIs, results and latency metrics."""
