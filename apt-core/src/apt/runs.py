"""Trained runs, for commands that packages bring: read one, with its model, tokenizer and profile."""

from __future__ import annotations

from apt.training.checkpoint import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]
