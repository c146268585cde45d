"""Mixtures of experts for APT: routers, the `moe` feed-forward network, and sparse upcycling in mid-training."""
