"""Retrieval: exact cosine search over passages of text, put before the prompt or into the hidden states."""
