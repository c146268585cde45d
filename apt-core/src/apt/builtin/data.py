"""apt-core's sources of text: Python's own standard library, the user's files, JSON Lines, and Hugging Face's datasets."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from apt.core.providers import DataProvider, Document, Pair
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


class Pairs(DataProvider):
    """Pairs for an encoder-decoder: JSON Lines, an object a line with a source and the target that is to be written of it."""

    api_level: ClassVar[int] = 1

    path: str | list[str] = Field(description=PATH)
    pattern: str = Field(default="*.jsonl", description="which files of a folder, at any depth")
    source_field: str = Field(default="source", description="the field that holds the source")
    target_field: str = Field(default="target", description="the field that holds the target")

    def read(self) -> Iterator[Document]:
        """A pair a line, named by file and line. Raises `DataError` for a line that has not both."""
        from apt.data.files import find_files, read_objects, take_field

        empty = True
        for name, path in find_files(self.path, self.pattern):
            for number, value in read_objects(path):
                where = f"{path}: line {number}"
                texts = [take_field(value, field, where) for field in (self.source_field, self.target_field)]
                for field, text in zip((self.source_field, self.target_field), texts, strict=True):
                    if not text:
                        raise DataError(f"{where}: its field {field!r} is empty; leave the line out, or fill it")
                empty = False
                yield Pair(f"{name}:{number:010}", texts[1], texts[0])
        if empty:
            raise DataError(f"data.path: there are no pairs in what {self.path!r} matches")

    def gives_pairs(self) -> bool:
        """It gives nothing else."""
        return True

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


class Datasets(DataProvider):
    """A dataset of Hugging Face's `datasets`, from its hub or from files: each row a document, whose `field` is the text."""

    api_level: ClassVar[int] = 1

    path: str = Field(description="a dataset's name or folder, or a format such as json, csv, parquet or text")
    config: str | None = Field(default=None, description="which of the dataset's configurations")
    split: str = Field(default="train", description="which of its splits is read; 80/10/10 is of these rows")
    field: str = Field(default="text", description="the column that holds the text")
    data_files: str | list[str] | None = Field(default=None, description="the files, for a format; " + PATH)
    revision: str | None = Field(default=None, description="a branch, tag or commit of the hub; a commit never changes")
    streaming: bool = Field(default=True, description="whether rows are read one by one, and nothing is kept on disk")
    limit: int | None = Field(default=None, ge=1, description="so many rows, the first ones; none: all")

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `datasets` brings it."""
        return ["datasets>=3"]

    def read(self) -> Iterator[Document]:
        """A document a row, blank ones left out. Raises `DataError` where the library or a row does not give one."""
        import datasets

        from apt.data.files import take_field

        where = f"{self.path} ({self.split})"
        number, empty = 0, True
        try:
            rows = datasets.load_dataset(
                self.path,
                self.config,
                data_files=self._files(),
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
            for number, row in enumerate(rows if self.limit is None else rows.take(self.limit), 1):
                text = take_field(row, self.field, f"{where}: row {number}")
                if text.strip():
                    empty = False
                    yield Document(f"{self.split}:{number:010}", text)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data.source: datasets: {where}: after {number} rows: {error}") from error
        if empty:
            raise DataError(f"data.source: datasets: {where} has no row with text")

    def fingerprint(self) -> str | None:
        """Names, sizes and times of files that lie here, or the commit; a branch of the hub may move."""
        from apt.data.files import find_files, fingerprint

        if self.data_files is not None and not self._is_remote():
            return fingerprint(find_files(self.data_files, "*", "data.data_files"))
        commit = self.revision or ""
        return commit if len(commit) == 40 and set(commit) <= set("0123456789abcdef") else None

    def _files(self) -> str | list[str] | None:
        if self.data_files is None or self._is_remote():
            return self.data_files
        from apt.data.files import find_files

        return [str(path) for _, path in find_files(self.data_files, "*", "data.data_files")]

    def _is_remote(self) -> bool:
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        return any("://" in each for each in files)
