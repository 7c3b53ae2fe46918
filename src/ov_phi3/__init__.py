"""Run Phi-3 class language models on Intel hardware with OpenVINO GenAI."""
