"""Latency measurements of a pipeline, their statistics, and reports as text and JSON."""
