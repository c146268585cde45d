"""Hugging Face's datasets, on files that lie here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt.builtin.data import Datasets
from apt.data import files
from apt.errors import DataError

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    for name, numbers in (("a", range(3)), ("b", range(3, 6))):
        lines = [json.dumps({"text": f"text {number}" if number != 4 else " ", "n": number}) for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "*.jsonl")


@pytest.mark.parametrize("streaming", [True, False])
def test_each_row_is_a_document(rows: str, streaming: bool) -> None:
    source = Datasets(path="json", data_files=rows, streaming=streaming)
    for _ in range(2):
        documents = list(source.read())
        assert [each.text for each in documents] == ["text 0", "text 1", "text 2", "text 3", "text 5"]
        assert [each.name for each in documents][::4] == ["train:0000000001", "train:0000000006"]
    limited = Datasets(path="json", data_files=rows, streaming=streaming, limit=2)
    assert [each.text for each in limited.read()] == ["text 0", "text 1"]


def test_text_files_come_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert [each.text for each in Datasets(path="text", data_files=str(tmp_path / "x.txt")).read()] == ["one", "two"]


def test_what_cannot_be_had_is_said(rows: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: has no field 'txt'; did you mean 'text'\?"):
        list(Datasets(path="json", data_files=rows, field="txt").read())
    with pytest.raises(DataError, match=r"its field 'n' holds a int, not text"):
        list(Datasets(path="json", data_files=rows, field="n").read())
    with pytest.raises(DataError, match=r"datasets: json \(tset\): after 0 rows"):
        list(Datasets(path="json", data_files=rows, split="tset").read())
    with pytest.raises(DataError, match=r"data\.data_files: '' names no file"):
        list(Datasets(path="json", data_files="").read())
    with pytest.raises(DataError, match=r"data\.data_files: .* matches no file"):
        list(Datasets(path="json", data_files=str(tmp_path / "*.csv")).read())
    with pytest.raises(DataError, match=r"datasets: no-such/thing \(train\): after 0 rows"):
        list(Datasets(path="no-such/thing").read())


def test_files_and_commits_tell_whether_they_have_changed(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "YOUNG", -1.0)
    assert Datasets(path="json", data_files=rows).fingerprint() is not None
    assert Datasets(path="some/thing").fingerprint() is None
    assert Datasets(path="some/thing", revision="main").fingerprint() is None
    assert Datasets(path="some/thing", revision="ab" * 20).fingerprint() == "ab" * 20
    assert Datasets(path="json", data_files="https://some.where/x.jsonl").fingerprint() is None
