"""Reads and checks the files of an exported model directory; nothing is loaded or run."""
