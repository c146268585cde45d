"""A file of a run is on the disk whole, or as it was before: what a crash leaves is never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_at_once(path: Path, content: str | bytes) -> None:
    """Write a file: to a hidden one beside it, flushed to the disk, which then takes its name."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Until what was written to a file, or which names a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
