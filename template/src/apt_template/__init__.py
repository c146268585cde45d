"""A feed-forward network for APT."""
