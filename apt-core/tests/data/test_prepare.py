"""Tokens are written once, found again, checked, and never taken for those of something else."""

from __future__ import annotations

import errno
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
from rich.console import Console

from apt.builtin.pretrained import Pretrained
from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.core.resolve import resolve_config
from apt.data import cache as cache_module
from apt.data import files
from apt.data.cache import MANIFEST, Cache
from apt.data.corpus import Corpus
from apt.data.prepare import Prepared, prepare
from apt.data.tokens import TokenSplit
from apt.errors import DataError, UserError


@pytest.fixture
def profile(profile_file: Path, tmp_path: Path) -> APTConfig:
    return load_profile(profile_file, sets=[f"data.cache={tmp_path / 'cache'}"]).config


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each reading of the whole text."""
    seen: list[str] = []
    whole = Corpus.scan

    def scan(*arguments: object) -> Corpus:
        seen.append("scan")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Corpus, "scan", scan)
    return seen


def made(config: APTConfig, out: io.StringIO | None = None) -> Prepared:
    return prepare(config, resolve_config(config), Console(file=out or io.StringIO(), width=500))


def test_tokens_are_the_texts_and_are_found_again(
    profile: APTConfig, text_file: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "YOUNG", 1e9)
    first = made(profile)
    text = text_file.read_bytes()
    parts = [first.splits[name] for name in ("train", "validation", "test")]
    assert b"".join(bytes((part.tokens[1:] - 3).astype(np.uint8)) for part in parts) == text
    assert [part.tokens[0] for part in parts] == [1, 1, 1]
    assert sum(part.num_bytes for part in parts) == first.num_bytes == len(text)
    before = (first.folder / "train.bin").stat().st_mtime_ns
    second = made(profile)
    assert (second.digest, second.folder) == (first.digest, first.folder)
    assert (second.folder / "train.bin").stat().st_mtime_ns == before
    assert scans == ["scan", "scan"]  # files that are too young are not trusted


def test_a_source_that_has_not_changed_is_not_read_again(
    profile: APTConfig, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "YOUNG", -1.0)
    first, second = made(profile), made(profile)
    assert first.digest == second.digest
    assert scans == ["scan"]


def test_another_text_start_or_tokenizer_has_tokens_of_its_own(profile: APTConfig, tmp_path: Path) -> None:
    folders = {made(profile).folder, made(profile.model_copy(update={"bos_token_id": 2})).folder}
    (tmp_path / "other.txt").write_text("another text, which is long enough to be cut into its parts " * 9)
    other = profile.data.model_copy(update={"path": str(tmp_path / "other.txt")})
    folders.add(made(profile.model_copy(update={"data": other})).folder)
    assert len(folders) == 3


def test_damaged_tokens_are_told_and_made_anew(profile: APTConfig) -> None:
    first = made(profile)
    content = (first.folder / "train.bin").read_bytes()
    (first.folder / "train.bin").write_bytes(content[:-1] + b"\7")
    said = io.StringIO()
    second = made(profile, said)
    assert (second.folder / "train.bin").read_bytes() == content
    assert said.getvalue().count(f"{first.folder} is damaged (train.bin) and is made anew") == 1
    (first.folder / MANIFEST).write_text("{")
    made(profile, said)
    assert "manifest.json: Expecting" in said.getvalue()
    assert json.loads((first.folder / MANIFEST).read_text())["files"]


def test_a_tokenizer_is_trained_once(profile: APTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    from apt.builtin.tokenizer import BPE

    trained: list[int] = []
    train = BPE.train
    monkeypatch.setattr(BPE, "train", lambda self, texts: trained.append(1) or train(self, texts))
    choice = {"provider": "bpe", "options": {"vocab_size": 512}}
    text = "".join(f"{number} {number**3:x} is {number**2:o}\n" for number in range(1500))
    (tmp_path / "numbers.txt").write_text(text)
    path = str(tmp_path / "numbers.txt")
    data = profile.data.model_validate({**profile.data.model_dump(), "path": path, "tokenizer": choice})
    config = profile.model_copy(update={"data": data, "vocab_size": 512})
    first = made(config)
    assert np.array_equal(first.splits["train"].tokens, made(config).splits["train"].tokens)
    assert trained == [1]
    with pytest.raises(UserError, match=r"model.vocab_size: 300 is less than the tokenizer's 512 ids"):
        prepare(config.model_copy(update={"vocab_size": 300}), resolve_config(config), Console(file=io.StringIO()))


def test_a_cache_that_cannot_be_written_is_named(profile: APTConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = profile.data.model_copy(update={"cache": str(tmp_path / "file")})
    with pytest.raises(DataError, match=r"data.cache: .*file: cannot be written: .*APT_CACHE_DIR"):
        made(profile.model_copy(update={"data": data}))


def test_a_home_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.cache: '~nosuch/x': there is no home folder '~nosuch'"):
        Cache("~nosuch/x")
    monkeypatch.setenv("APT_CACHE_DIR", "~nosuch/x")
    with pytest.raises(DataError, match=r"APT_CACHE_DIR: '~nosuch/x': there is no home folder"):
        Cache()
    with pytest.raises(DataError, match=r"data.tokenizer.path: '~nosuch/x': there is no home folder"):
        Pretrained(path="~nosuch/x").get_vocab_size()


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("things", {"a": 1}, fail)
    assert [path.suffix for path in (tmp_path / "things").iterdir()] == [".lock"]


def test_two_writers_make_a_thing_once(tmp_path: Path) -> None:
    made: list[str] = []
    said: list[str] = []
    both, go = threading.Barrier(2), threading.Event()

    def make(folder: Path) -> dict[str, object]:
        made.append(threading.current_thread().name)
        go.wait(10)
        (folder / "thing").write_text("whole")
        return {"by": threading.current_thread().name}

    def note(text: str) -> None:
        said.append(text)
        go.set()

    facts: list[object] = []

    def work() -> None:
        both.wait(10)
        facts.append(Cache(tmp_path, note).get("things", {"a": 1}, make).facts)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert facts == [{"by": made[0]}] * 2
    assert said == [f"waiting for another process that makes things in {tmp_path}"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_where_there_are_no_locks_two_writers_make_a_thing_each_in_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    said: list[str] = []
    cache, places = Cache(tmp_path, said.append), []

    def make(folder: Path) -> dict[str, object]:
        places.append(folder)
        (folder / "thing").write_text("half")
        if len(places) == 1:
            cache.get("things", {"a": 1}, make)
        (folder / "thing").write_text("whole")
        return {}

    entry = cache.get("things", {"a": 1}, make)
    assert (entry.folder / "thing").read_text() == "whole"
    assert len({*places}) == 2
    assert [path.name for path in (tmp_path / "things").iterdir() if path.suffix == ".part"] == []
    assert (
        said
        == [f"{tmp_path}: this file system has no locks; another process that makes the same things does so too"] * 2
    )
    assert cache.get("things", {"a": 1}, make).folder == entry.folder


def test_what_another_process_has_made_at_the_last_moment_is_used_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        shutil.copytree(self, target)
        (target / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    entry = Cache(tmp_path).get("things", {"a": 1}, lambda folder: {"size": (folder / "thing").write_text("whole")})
    assert entry.facts == {"size": 5}
    assert sorted(path.name for path in entry.folder.iterdir()) == ["manifest.json", "theirs", "thing"]


def test_the_folder_is_the_profiles_then_the_environments_then_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache_module.VARIABLE, str(tmp_path / "env"))
    assert Cache("/some/where").root == Path("/some/where")
    assert Cache().root == tmp_path / "env"
    monkeypatch.delenv(cache_module.VARIABLE)
    assert Cache().root.name == "apt-core"


def test_pages_that_were_read_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    tokens = np.arange(5000, dtype="<u4")
    (tmp_path / "x.bin").write_bytes(tokens.tobytes())
    split = TokenSplit.open(tmp_path / "x.bin", "<u4", 5000, 1)
    monkeypatch.setattr("apt.data.tokens.HELD", 2**13)
    for start in range(0, 4900, 100):
        assert split.gather(np.array([start]), 99).tokens[0].tolist() == list(range(start, start + 99))
    if hasattr(psutil.Process(), "memory_maps"):
        maps = psutil.Process().memory_maps(grouped=True)
        assert [each.rss for each in maps if each.path.endswith("x.bin")] == [0]
    last = split.gather(np.array([0, 4990]), 20)
    assert last.mask is not None
    assert last.mask[1].tolist() == [True] * 9 + [False] * 11
    assert last.tokens[1, :10].tolist() == list(range(4990, 5000))
