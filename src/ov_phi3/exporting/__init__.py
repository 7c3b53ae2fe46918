"""Export of a Hugging Face model to OpenVINO, with optimum-cli in a subprocess."""
