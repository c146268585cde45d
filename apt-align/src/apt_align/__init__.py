"""Alignment of two states of the same tokens for APT (not alignment in the sense of RLHF)."""
