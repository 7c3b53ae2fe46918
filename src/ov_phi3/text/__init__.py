"""Messages to token ids and token ids to text: chat templates, tokenizer graphs, detokenization, stop strings."""
