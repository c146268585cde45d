"""A folder of texts as documents."""

from __future__ import annotations

import os
from pathlib import Path

from apt.core.providers import Document
from apt.errors import DataError


def read_folder(folder: Path) -> list[Document]:
    """Every file under `folder` that is UTF-8 text, by path; hidden files and folders are left out.

    A document's name is its path within `folder`. Raises `apt.errors.DataError` where the folder is missing or holds no
    readable text.
    """
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; give one that holds text files")
    if not folder.is_dir():
        raise DataError(f"{folder}: a file, not a folder; give the folder that holds it")
    documents, skipped = [], 0
    for path in _files(folder):
        text = _read_text(path)
        if text is None:
            skipped += 1
        else:
            documents.append(Document(path.relative_to(folder).as_posix(), text))
    if not documents:
        found = f"{skipped} files, none of them UTF-8 text with anything in it" if skipped else "no files"
        raise DataError(f"{folder}: no readable text: {found}")
    return documents


def _files(folder: Path) -> list[Path]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _read_text(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError):
        return None
    return None if "\0" in text or not text.strip() else text
