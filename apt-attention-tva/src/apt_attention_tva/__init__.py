"""Attention in few dimensions (Tri-Vein), and attention that adjusts its own scores (autopoietic)."""
