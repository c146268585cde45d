"""Checkpoints of other programs: Llama-family weights in safetensors folders and GGUF files, read and written."""
