"""Retrieval for APT."""
