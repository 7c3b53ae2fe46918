"""Reading a model directory, piece by piece; `ov_phi3.model_info` puts the pieces together."""
