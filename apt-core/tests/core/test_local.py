"""Provider code in a file beside the profile: run only with leave, and recorded by its digest."""

from __future__ import annotations

import hashlib

import pytest

from apt.core.config import Choice
from apt.core.local import LocalCode, is_local
from apt.core.registry import Registry, record_of
from apt.errors import ProviderBrokenError, ProviderDisabledError, ProviderNotFoundError

MINE = Choice(provider="./mine.py:Mine", options={"size": 5})


@pytest.fixture
def folder(tmp_path, data_source):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.py").write_text(data_source)
    (tmp_path / "outside.py").write_text(data_source)
    return tmp_path / "profiles"


@pytest.fixture
def registry(folder):
    made = Registry()
    made.allow_local_code(LocalCode(folder))
    return made


def test_what_names_a_file_is_told_from_what_names_a_provider():
    assert all(map(is_local, ("./mine.py:Mine", "mine.py:Mine", "/a/b.py:C")))
    assert not any(map(is_local, ("sdpa", "mine.py", "mine:Mine", "./mine.py:a.b", "./mine.py:")))


def test_without_leave_no_file_is_run(folder, tmp_path):
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ProviderDisabledError, match=r"code in a file is not run unasked; .* --allow-local-code"):
        Registry().resolve("data", MINE)
    assert not (tmp_path / "ran").exists()


def test_with_leave_it_is_a_provider_like_any_other(registry, folder, data_source):
    found = registry.resolve("data", MINE)
    assert (found.used, found.distribution, found.provider.size) == ("./mine.py:Mine", "(file)", 5)
    assert found.provider.get_name() == "./mine.py:Mine"
    assert record_of(found.provider).sha256 == hashlib.sha256(data_source.encode()).hexdigest()
    assert record_of(found.provider).path == str(folder / "mine.py")
    assert registry.resolve("data", MINE).provider is found.provider


def test_taking_the_leave_back_takes_the_provider_back(registry):
    registry.resolve("data", MINE)
    registry.allow_local_code(None)
    with pytest.raises(ProviderDisabledError):
        registry.resolve("data", MINE)


def test_a_file_that_has_changed_is_run_anew(registry, folder, data_source):
    before = registry.get("data", MINE.provider, fallback=False)
    (folder / "mine.py").write_text(data_source.replace("default=3", "default=4"))
    after = registry.get("data", MINE.provider, fallback=False)
    assert (before.size, after.size) == (3, 4)
    assert record_of(before).sha256 != record_of(after).sha256


@pytest.mark.parametrize("name", ["../outside.py:Mine", "./link.py:Mine", "{root}/outside.py:Mine"])
def test_a_file_outside_of_the_profiles_folder_needs_the_flag(registry, folder, tmp_path, name):
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    name = name.format(root=tmp_path)
    with pytest.raises(ProviderDisabledError, match="lies outside of"):
        registry.get("data", name, fallback=False)
    registry.allow_local_code(LocalCode(folder, anywhere=True))
    assert registry.get("data", name, fallback=False).size == 3


def test_with_the_flag_a_file_is_looked_for_in_the_current_folder_too(registry, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProviderNotFoundError):
        registry.get("data", "./outside.py:Mine", fallback=False)
    registry.allow_local_code(LocalCode(folder, anywhere=True))
    assert registry.get("data", "./outside.py:Mine", fallback=False).size == 3


def test_a_file_that_is_not_there_is_named(registry):
    with pytest.raises(ProviderNotFoundError, match=r"gone\.py cannot be read: No such file"):
        registry.get("data", "./gone.py:Mine", fallback=False)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise KeyError('x')", "running .*mine.py failed: KeyError: 'x'"),
        ("raise SystemExit(3)", "failed: SystemExit: 3"),
        ("def f(:", "failed: SyntaxError"),
        ("Other = 1", "holds no Mine"),
        ("Mine = 1", "1 is not a subclass of apt.core.providers.data.DataProvider"),
        ("class Mine: pass", "class Mine is not a subclass of"),
    ],
)
def test_a_file_that_is_broken_is_named_with_what_is_wrong(registry, folder, source, why):
    (folder / "mine.py").write_text(source)
    for _ in range(2):
        with pytest.raises(ProviderBrokenError, match=why):
            registry.resolve("data", MINE)
