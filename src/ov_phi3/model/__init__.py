"""What the files of an exported model directory say; nothing is loaded or run."""
