"""Sources of text, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt.builtin.data import Files, StandardLibrary
from apt.errors import DataError


def test_the_standard_library_is_a_real_corpus() -> None:
    documents = StandardLibrary().read()
    names = [document.name for document in documents]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if name.startswith("test/") or "site-packages" in name]
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_files_are_found_by_name_folder_glob_and_list(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.md"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "empty.txt").write_text("  \n")

    def names(path: object, **options: object) -> list[str]:
        documents = Files(path=path, **options).read()  # type: ignore[arg-type]
        return [Path(document.name).relative_to(tmp_path).as_posix() for document in documents]

    assert names(str(tmp_path / "a.txt")) == ["a.txt"]
    assert names(str(tmp_path)) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(str(tmp_path), pattern="*.md") == ["d.md"]
    assert names(str(tmp_path / "**/*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names([str(tmp_path / "d.md"), str(tmp_path / "a.txt")]) == ["a.txt", "d.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\x00def", "this is not text .it holds NUL bytes"),
        (b"good\nb\xffd", r"not UTF-8 at byte 6 \(line 2\); convert it with iconv"),
        (b"   ", "is empty"),
        (None, "matches no file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Files(path=str(tmp_path / "x.txt")).read()
