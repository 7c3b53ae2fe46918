"""From a Hugging Face model to an exported one, with optimum-cli in a subprocess."""
