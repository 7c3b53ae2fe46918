"""Measuring a pipeline, and reports of what was measured."""
