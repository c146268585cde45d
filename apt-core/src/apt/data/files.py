"""Text files: found by name, read in pieces, and refused where they are not text or change under the reader."""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from apt.core.providers import Document
from apt.errors import DataError, nearest

CHUNK = 2**20
"""Bytes that are read at once."""
LONGEST_LINE = 2**26
"""Characters of the longest line of JSON, which has to fit in memory whole."""
YOUNG = 2.0
"""Seconds in which a file may change without its time telling it."""
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}

Files = list[tuple[str, Path]]
"""Names of documents, and where they lie."""


def find_files(asked: str | list[str], pattern: str, option: str = "data.path") -> Files:
    """The files that a file's name, a folder, a glob, or a list of these means, in the order of their names.

    A file that was found in a folder or by a glob is named as it is seen from there, so that a corpus has the same names wherever
    it lies; those of a list are named by their paths as they are spelled. Raises `DataError`, with the `option` that asks, where
    something matches nothing or cannot be looked for.
    """
    alone = isinstance(asked, str)
    wanted = [asked] if isinstance(asked, str) else asked
    if not wanted or not all(wanted):
        raise DataError(
            f"{option}: {asked!r} names no file; give a file, a folder, a glob, or '.' for the working directory"
        )
    found: dict[str, Path] = {}
    for each in wanted:
        root, paths = _find(each, pattern, option)
        if not paths:
            raise DataError(
                f"{option}: {each!r} matches no file (seen from {Path.cwd()})"
                + (f"; the folder is there, but holds no {pattern}: set data.pattern" if Path(each).is_dir() else "")
            )
        found |= {(path.relative_to(root) if alone else path).as_posix(): path for path in paths}
    return sorted(found.items())


def expanded(asked: str | Path, option: str) -> Path:
    """A path that may begin with a home folder. Raises `DataError`, with the `option` that asks, where there is no such home."""
    try:
        return Path(asked).expanduser()
    except RuntimeError as error:
        home = Path(asked).parts[0]
        raise DataError(f"{option}: {str(asked)!r}: there is no home folder {home!r}; give the path in full") from error


def _find(asked: str, pattern: str, option: str) -> tuple[Path, list[Path]]:
    """Where names begin, and the files."""
    path = expanded(asked, option)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        try:
            return path, [each for each in path.rglob(pattern) if each.is_file()]
        except (NotImplementedError, ValueError) as error:
            hint = "a pattern is looked for below data.path, such as *.txt"
            raise DataError(f"data.pattern: {pattern!r} cannot be looked for ({error}); {hint}") from error
    fixed = Path(*(part for part in _until_magic(path.parts)))
    return fixed, [each for each in _matching(Path(), path.parts) if each.is_file()]


def _matching(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What a glob of these parts matches below `root`: as `glob` has it, but a link that leads back in a circle ends there."""
    before = parts[: parts.index("**")] if "**" in parts else parts
    found = [root.joinpath(each) for each in glob.iglob(os.path.join(*before), root_dir=root)] if before else [root]
    if "**" not in parts:
        yield from found
        return
    after = parts[len(before) + 1 :] or ("*",)
    for start in found:
        for folder in _folders(start, frozenset()):
            yield from _matching(folder, after)


def _folders(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """A folder and those below it; hidden ones, which `glob` leaves out, and those that are `above` are not."""
    real = folder.resolve()
    if real in above:
        return
    yield folder
    inside: list[Path] = []
    with contextlib.suppress(OSError):  # what may not be looked into, or is no folder
        inside = sorted(each for each in folder.iterdir() if not each.name.startswith(".") and each.is_dir())
    for each in inside:
        yield from _folders(each, above | {real})


def _until_magic(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def fingerprint(files: Files) -> str | None:
    """A digest of names, sizes and times; None where a file is so young that it may change and keep them."""
    digest = hashlib.sha256()
    newest = 0
    for name, path in files:
        seen = path.stat()
        newest = max(newest, seen.st_mtime_ns, seen.st_ctime_ns)
        digest.update(json.dumps([name, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]).encode())
    return None if time.time() - newest / 1e9 < YOUNG else digest.hexdigest()


class TextFile(Document):
    """A file as a document; its text is read when it is wanted, and by `pieces` never held whole."""

    path: Path

    def __init__(self, name: str, path: Path) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "path", path)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces())

    @property
    def num_bytes(self) -> int:
        """As the file system says; reading finds out where it is not so."""
        return self.path.stat().st_size

    def pieces(self) -> Iterator[str]:
        """The text, a chunk at a time. Raises `DataError` where it is not UTF-8, binary, or changes meanwhile."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines = 1
        for at, chunk in _chunks(self.path):
            if b"\0" in chunk:
                magic = next((what for start, what in _MAGIC.items() if at == 0 and chunk.startswith(start)), "")
                what = f"it is packed by {magic}; unpack it" if magic else "it holds NUL bytes"
                raise DataError(f"{self.path}: this is not text ({what})")
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = at - held + error.start
                line = lines + error.object.count(b"\n", 0, error.start)
                raise DataError(
                    f"{self.path}: not UTF-8 at byte {place} (line {line}); convert it with iconv"
                ) from error
            lines += chunk.count(b"\n")
            if text:
                yield text


def is_blank(path: Path) -> bool:
    """Whether a file holds nothing but white space."""
    return not any(chunk.strip() for _, chunk in _chunks(path, first=4096))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold something, with their numbers from 1.

    Raises `DataError` as `TextFile` does, and for a line that is longer than `LONGEST_LINE`.
    """
    number, held = 1, ""
    for piece in TextFile(path.name, path).pieces():
        *whole, held = (held + piece).split("\n")
        for line in whole:
            if line.strip():
                yield number, line
            number += 1
        if len(held) > LONGEST_LINE:
            raise DataError(
                f"{path}: line {number} is longer than {LONGEST_LINE // 2**20} MiB, and a line of JSON has to fit in memory; "
                "is this JSON Lines? text without structure is read by source: files"
            )
    if held.strip():
        yield number, held


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a JSON Lines file with the numbers of their lines. Raises `DataError` where a line is something else."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            what = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}: line {number} is not JSON ({what})") from error
        except RecursionError as error:
            raise DataError(f"{path}: line {number} is nested too deeply") from error
        if not isinstance(value, dict):
            raise DataError(
                f'{path}: line {number} holds a {type(value).__name__}, not an object such as {{"text": ...}}'
            )
        yield number, value


def take_field(value: dict[str, object], field: str, where: str) -> str:
    """The text in a field. Raises `DataError` where there is none, naming the fields that are there."""
    if field not in value:
        hint = nearest(field, value)
        has = ", ".join(map(str, value)) or "nothing"
        raise DataError(f"{where}: has no field {field!r}; {hint + '; ' if hint else ''}it has: {has}")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: its field {field!r} holds a {type(text).__name__}, not text")
    return text


def _chunks(path: Path, first: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file with their places, and an empty chunk at the end."""
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            at, size = 0, CHUNK if first is None else first
            while chunk := file.read(size):
                yield at, chunk
                at, size = at + len(chunk), CHUNK
            after = os.fstat(file.fileno())
            if (at, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise DataError(f"{path}: has changed while it was read; start again when nobody writes to it")
            yield at, b""
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
