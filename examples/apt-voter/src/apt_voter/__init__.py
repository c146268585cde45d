"""Decode-time voting: where the model is unsure of the next token, several draws of it vote."""
