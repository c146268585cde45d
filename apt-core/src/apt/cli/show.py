"""How commands show rows of words: aligned columns, whole on a pipe, folded on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt.core.shown import harmless

if TYPE_CHECKING:
    from apt.core.resolution import Resolution


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows under their columns; those named in `right` hold numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        number = column in right
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A pipe has no width, and a cut line cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def written(text: str) -> str:
    """What a model wrote, for standard output: harmless on a terminal, and elsewhere as it is."""
    return harmless(text) if sys.stdout.isatty() else text


def print_json(value: object) -> None:
    """Print a value for programs; rows that come one by one are a list."""
    import json

    print(json.dumps(list(value) if isinstance(value, Iterator) else value, indent=2))


def print_providers(resolutions: Iterable[Resolution]) -> None:
    """Print which provider stands where, of what distribution, and why it is not the one that was asked for."""
    print_table(
        ("WHERE", "PROVIDER", "DISTRIBUTION", ""),
        (
            (
                each.where,
                f"{each.kind}.{each.used}",
                f"{each.distribution} {each.version}",
                f"asked for {each.asked}: {each.why}" if each.why else "",
            )
            for each in resolutions
        ),
    )


def called_as() -> str:
    """The command as it was called, so that a line which names it can be pasted."""
    given = sys.argv[0]
    if Path(given).name == "__main__.py":
        return "python -m apt"
    return "apt-core" if given == shutil.which("apt-core") else given


def count(number: float) -> str:
    """A number with thousands marked, or in millions where it is large."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves the fewest digits."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= bytes_:
            return f"{num_bytes / bytes_:.2f} {unit}"
    return f"{num_bytes:.0f} B"
