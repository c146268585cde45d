"""What is printed while nobody reads it any more, as after ``| head``: a run goes on without a reader."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from apt.core.shown import to_nowhere

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Droppable(io.FileIO):
    """A stream that drops what is written once its reader has gone."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, to nowhere if need be."""
        try:
            return super().write(data)
        except BrokenPipeError:
            to_nowhere(self.fileno())
            return super().write(data)


@contextlib.contextmanager
def outlive_readers() -> Iterator[None]:
    """In this context what is printed is dropped once nobody reads it, where it would end the command."""
    with (
        _droppable(sys.stdout) as out,
        _droppable(sys.stderr) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield


@contextlib.contextmanager
def _droppable(stream: TextIO) -> Iterator[TextIO]:
    """The stream as one that drops; itself where it is a terminal, or no file."""
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        yield stream
        return
    try:
        number = stream.fileno()
    except OSError:
        yield stream
        return
    stream.flush()
    with io.TextIOWrapper(
        io.BufferedWriter(_Droppable(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    ) as droppable:
        yield droppable
