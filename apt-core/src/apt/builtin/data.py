"""apt-core's sources of text: Python's own standard library, and the user's files."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from apt.core.providers import DataProvider, Document
from apt.errors import DataError

LEFT_OUT = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "lib2to3", "__pycache__"}
)


class StandardLibrary(DataProvider):
    """The sources of Python's standard library: about 11 MB of real text that is on every machine (PSF licence)."""

    api_level: ClassVar[int] = 1

    def read(self) -> Sequence[Document]:
        """Every module but tests and demonstrations. Raises `DataError` where Python came without sources."""
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts)]
        documents = _documents((path.relative_to(root).as_posix(), path) for path in paths)
        if not documents:
            raise DataError(f"data.source: this Python has no sources of its library in {root}; use source: files")
        return documents


class Files(DataProvider):
    """Text files: `path` is a file, a folder (every file in it, with `pattern`), a glob, or a list of these."""

    api_level: ClassVar[int] = 1

    path: str | list[str] = Field(description="a file, a folder, a glob such as texts/**/*.txt, or a list of these")
    pattern: str = Field(default="*.txt", description="which files of a folder, at any depth")

    def read(self) -> Sequence[Document]:
        """The files, in the order of their names. Raises `DataError` where one cannot be read or none is found."""
        found: dict[str, Path] = {}
        for asked in [self.path] if isinstance(self.path, str) else self.path:
            paths = self._find(asked)
            if not paths:
                raise DataError(f"data.path: {asked!r} matches no file (seen from {Path.cwd()})")
            found.update((path.as_posix(), path) for path in paths)
        documents = _documents(found.items())
        if not documents:
            raise DataError(f"data.path: every file that {self.path!r} matches is empty")
        return documents

    def _find(self, asked: str) -> list[Path]:
        path = Path(asked).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return [each for each in path.rglob(self.pattern) if each.is_file()]
        return [Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file()]


def _documents(files: Iterable[tuple[str, Path]]) -> list[Document]:
    """The texts of files by name; empty ones are left out, as they hold nothing."""
    documents: list[Document] = []
    for name, path in sorted(files):
        content = path.read_bytes()
        if b"\0" in content[:65536]:
            raise DataError(f"{path}: this is not text (it holds NUL bytes)")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}: not UTF-8 at byte {error.start} (line {line}); convert it with iconv") from error
        if text.strip():
            documents.append(Document(name, text))
    return documents
