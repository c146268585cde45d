"""apt-core's sources of text: Python's own standard library, the user's files, JSON Lines, and Hugging Face's datasets."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from apt.core.providers import DataProvider, Document
from apt.errors import DataError

LEFT_OUT = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "lib2to3", "__pycache__"}
)
PATH = "a file, a folder, a glob such as texts/**/*, or a list of these"


class StandardLibrary(DataProvider):
    """The sources of Python's standard library: about 11 MB of real text that is on every machine (PSF licence)."""

    api_level: ClassVar[int] = 1

    def read(self) -> Iterator[Document]:
        """Every module but tests and demonstrations. Raises `DataError` where Python came without sources."""
        yield from _texts(self._files(), "data.source: every file of Python's library is empty")

    def fingerprint(self) -> str | None:
        """Names, sizes and times of its files."""
        from apt.data.files import fingerprint

        return fingerprint(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts)]
        if not paths:
            raise DataError(f"data.source: this Python has no sources of its library in {root}; use source: files")
        return sorted((path.relative_to(root).as_posix(), path) for path in paths)


class Files(DataProvider):
    """Text files: `path` is a file, a folder (every file in it, with `pattern`), a glob, or a list of these."""

    api_level: ClassVar[int] = 1

    path: str | list[str] = Field(description=PATH)
    pattern: str = Field(default="*.txt", description="which files of a folder, at any depth")

    def read(self) -> Iterator[Document]:
        """The files, in the order of their names. Raises `DataError` where one cannot be read or none is found."""
        from apt.data.files import find_files

        yield from _texts(
            find_files(self.path, self.pattern), f"data.path: every file that {self.path!r} matches is empty"
        )

    def fingerprint(self) -> str | None:
        """Names, sizes and times of the files."""
        from apt.data.files import find_files, fingerprint

        return fingerprint(find_files(self.path, self.pattern))


class JsonLines(DataProvider):
    """JSON Lines: an object a line, whose `field` is the text of a document; lines and texts that are blank are left out."""

    api_level: ClassVar[int] = 1

    path: str | list[str] = Field(description=PATH)
    pattern: str = Field(default="*.jsonl", description="which files of a folder, at any depth")
    field: str = Field(default="text", description="the field that holds the text")

    def read(self) -> Iterator[Document]:
        """A document a line, named by file and line. Raises `DataError` for a line that is not as it should be."""
        from apt.data.files import find_files, read_objects, take_field

        empty = True
        for name, path in find_files(self.path, self.pattern):
            for number, value in read_objects(path):
                text = take_field(value, self.field, f"{path}: line {number}")
                if text.strip():
                    empty = False
                    # Of one length, so that names are in the order of lines.
                    yield Document(f"{name}:{number:010}", text)
        if empty:
            raise DataError(f"data.path: there is no text in what {self.path!r} matches")

    def fingerprint(self) -> str | None:
        """Names, sizes and times of the files."""
        from apt.data.files import find_files, fingerprint

        return fingerprint(find_files(self.path, self.pattern))


def _texts(files: list[tuple[str, Path]], empty: str) -> Iterator[Document]:
    """Files as documents; those that hold nothing are left out, and where all do, that is an error."""
    from apt.data.files import TextFile, is_blank

    documents = (TextFile(name, path) for name, path in files if not is_blank(path))
    first = next(documents, None)
    if first is None:
        raise DataError(empty)
    yield first
    yield from documents
