"""Sources of text, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apt.builtin.data import Files, JsonLines, Pairs, StandardLibrary
from apt.data import files as module
from apt.data.files import TextFile
from apt.errors import DataError


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_the_standard_library_is_a_real_corpus() -> None:
    documents = list(StandardLibrary().read())
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if name.startswith("test/") or "site-packages" in name]
    assert sum(document.num_bytes for document in documents) > 5_000_000
    assert StandardLibrary().fingerprint() == StandardLibrary().fingerprint() is not None


def test_files_are_found_by_name_folder_glob_and_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.md"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "empty.txt").write_text("  \n")

    def names(path: str | list[str], pattern: str = "*.txt") -> list[str]:
        return [document.name for document in Files(path=path, pattern=pattern).read()]

    assert names(str(tmp_path / "a.txt")) == ["a.txt"]
    assert names(str(tmp_path)) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(str(tmp_path), "*.md") == ["d.md"]
    assert names(str(tmp_path / "**/*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(str(tmp_path / "s*/*.txt")) == ["sub/c.txt"]
    monkeypatch.chdir(tmp_path)
    assert names(["d.md", "a.txt", "*.txt"]) == ["a.txt", "b.txt", "d.md"]
    assert names(["sub"]) == ["sub/c.txt"]


def test_links_that_lead_back_in_a_circle_give_no_file_twice(tmp_path: Path) -> None:
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("texts/a.txt", "texts/sub/b.txt", "texts/.hidden.txt", "elsewhere/c.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    # Two of them: followed to the system's limit there would be 2^40 paths.
    for link in ("up", "again"):
        (tmp_path / "texts/sub" / link).symlink_to(tmp_path / "texts")
    (tmp_path / "texts/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "texts")
    names = ["a.txt", "link/c.txt", "sub/b.txt"]
    for path in ("texts/**/*.txt", "texts/**"):
        assert [document.name for document in Files(path=str(tmp_path / path)).read()] == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\x00def", "this is not text .it holds NUL bytes"),
        (b"a" * 3_000_000 + b"\x00", "this is not text .it holds NUL bytes"),
        (b"\x1f\x8b\x08\x00\x00", "this is not text .it is packed by gzip; unpack it"),
        (b"good\nb\xffd", r"not UTF-8 at byte 6 \(line 2\); convert it with iconv"),
        ("é".encode() * 600_000 + b"\n\n\xc3", r"not UTF-8 at byte 1200002 \(line 3\)"),
        (b"   ", "is empty"),
        (None, "matches no file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ["".join(document.pieces()) for document in Files(path=str(tmp_path / "x.txt")).read()]


def test_a_folder_without_what_is_looked_for_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(DataError, match=r"matches no file .* but holds no \*.txt: set data.pattern"):
        list(Files(path=str(tmp_path)).read())


@pytest.mark.parametrize("source", [Files, JsonLines, Pairs])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": ""},
            r"data\.path: '' names no file; give a file, a folder, a glob, or '\.' for the working directory",
        ),
        ({"path": []}, r"data\.path: \[\] names no file"),
        ({"path": ["a.txt", ""]}, r"data\.path: \['a.txt', ''\] names no file"),
        ({"path": "~nosuch/x.txt"}, r"data\.path: '~nosuch/x.txt': there is no home folder '~nosuch'"),
        ({"path": ".", "pattern": "/x/*.txt"}, r"data\.pattern: '/x/\*\.txt' cannot be looked for .*below data\.path"),
    ],
)
def test_options_that_cannot_name_files_are_refused(
    source: type[Files | JsonLines | Pairs],
    options: dict[str, str | list[str]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.jsonl"):
        write_lines(tmp_path / name, {"text": "a", "source": "a", "target": "a"})
    for use in (lambda asked: list(asked.read()), lambda asked: asked.fingerprint()):
        with pytest.raises(DataError, match=message):
            use(source.model_validate(options))


def test_a_file_is_read_in_pieces_that_never_cut_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    text = "".join(chr(number) for number in (*range(1, 400), *range(0x4E00, 0x4E40), 0x1F600)) + "\r\n"
    (tmp_path / "x.txt").write_bytes(text.encode())
    document = TextFile("x", tmp_path / "x.txt")
    assert len(list(document.pieces())) > 50
    assert document.text == text
    assert document.num_bytes == len(text.encode())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a" * 3_000_000)
    pieces = TextFile("x", path).pieces()
    next(pieces)
    with path.open("a") as file:
        file.write("more")
    with pytest.raises(DataError, match=r"x.txt: has changed while it was read"):
        list(pieces)
    path.unlink()
    with pytest.raises(DataError, match=r"x.txt: cannot be read: No such file"):
        list(TextFile("x", path).pieces())


def test_a_fingerprint_tells_a_change_and_does_not_trust_what_is_younger_than_its_clock(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one")
    source = Files(path=str(path))
    assert source.fingerprint() is None
    past = module.YOUNG
    try:
        module.YOUNG = -1.0
        first = source.fingerprint()
        assert first == source.fingerprint() is not None
        path.write_text("two")
        assert source.fingerprint() != first
        os.utime(path, ns=(0, 0))
        assert source.fingerprint() != first
    finally:
        module.YOUNG = past


def test_a_line_of_json_is_a_document(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"text": "one\ntwo", "id": 3}, {"text": " "}, {"text": "three"})
    path.write_text(path.read_text() + "\n\n" + '{"text": "no end of line"}')
    documents = list(JsonLines(path=str(path)).read())
    assert [(each.name, each.text) for each in documents] == [
        ("x.jsonl:0000000001", "one\ntwo"),
        ("x.jsonl:0000000003", "three"),
        ("x.jsonl:0000000006", "no end of line"),
    ]
    write_lines(tmp_path / "y.jsonl", {"body": "of y"})
    assert [each.text for each in JsonLines(path=str(tmp_path / "y.jsonl"), field="body").read()] == ["of y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"x.jsonl: line 2 is not JSON \(column 10: Expecting value\)"),
        ("[1]", r"line 1 holds a list, not an object such as \{\"text\": ...\}"),
        ('{"txt": "a", "id": 1}', r"line 1: has no field 'text'; did you mean 'txt'\?; it has: txt, id"),
        ('{"text": 3}', "line 1: its field 'text' holds a int, not text"),
        ('\n\n{"text": "  "}\n', "there is no text in what"),
        ("[" * 100_000, "line 1 is nested too deeply"),
    ],
)
def test_a_line_that_is_something_else_is_refused_by_its_number(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(JsonLines(path=str(tmp_path)).read())


def test_a_line_of_json_that_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 2 * 2**20)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 4 * 2**20)
    with pytest.raises(DataError, match=r"line 2 is longer than 2 MiB.* is this JSON Lines"):
        list(JsonLines(path=str(tmp_path)).read())
