"""The lock pins code and options, and says what differs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core import lock as lock_module
from apt.core.config import Choice
from apt.core.local import LocalCode
from apt.core.lock import Lock, Locked, check_lock, compare, make_lock
from apt.core.registry import Registry
from apt.errors import CheckpointError

words = st.text(st.characters(codec="utf-8"), max_size=5)
locks = st.lists(
    st.builds(Locked, words, words, words, words, words, words, words), unique_by=lambda entry: entry.where, max_size=4
).map(lambda entries: Lock(tuple(entries)))


@pytest.fixture(autouse=True)
def _forget_sources():
    lock_module._hash_source.cache_clear()
    yield
    lock_module._hash_source.cache_clear()


def pin(*providers):
    return make_lock(SimpleNamespace(parts=lambda: ((f"part{i}", each) for i, each in enumerate(providers))))


def installed(site, data_source, version="1.0", modules=None):
    site.add(
        "apt-a", {"data.a": "apt_a.provider:Mine"}, {"apt_a.provider": data_source} | (modules or {}), version=version
    )
    return site.registry()


@given(locks)
def test_a_lock_survives_json(lock):
    again = Lock.from_dict(json.loads(json.dumps(lock.to_dict())))
    assert again == lock
    assert again.digest == lock.digest
    assert compare(lock, again) == []


@given(locks, locks)
def test_locks_differ_exactly_when_something_is_said_to(one, two):
    assert (compare(one, two) == []) == (set(one.entries) == set(two.entries))


def test_every_field_is_pinned(site, data_source):
    registry = installed(site, data_source)
    (entry,) = pin(registry.get("data", "a", fallback=False)).entries
    assert (entry.where, entry.kind, entry.name) == ("part0", "data", "a")
    assert (entry.distribution, entry.version) == ("apt-a", "1.0")
    assert len(entry.source) == len(entry.options) == 64


def test_other_options_differ_and_defaults_that_are_given_do_not(site, data_source):
    registry = installed(site, data_source)
    plain, same, other = (registry.get("data", "a", options) for options in ({}, {"size": 3}, {"size": 4}))
    assert compare(pin(plain), pin(same)) == []
    assert [str(fault) for fault in compare(pin(plain), pin(other))] == ["part0: its options differ"]


def test_a_change_anywhere_in_the_package_is_seen(site, data_source):
    registry = installed(site, data_source, modules={"apt_a.layers.attention": "x = 1"})
    provider = registry.get("data", "a", fallback=False)
    before = pin(provider)
    (site.folder / "apt_a" / "layers" / "attention.py").write_text("x = 2")
    lock_module._hash_source.cache_clear()
    (fault,) = compare(before, pin(provider))
    assert str(fault) == "part0: the source of apt-a 1.0 has changed"


def test_another_version_distribution_or_provider_is_named():
    def one(**changes: str) -> Lock:
        fields = {"kind": "data", "name": "a", "distribution": "apt-a", "version": "1", "source": "s", "options": "o"}
        return Lock((Locked(where="data", **(fields | changes)),))

    assert str(compare(one(), one(version="2", source="t"))[0]) == "data: apt-a was 1, is 2"
    assert str(compare(one(), one(distribution="apt-b"))[0]) == "data: came with apt-a 1, comes with apt-b 1"
    assert str(compare(one(), one(name="b"))[0]) == "data: was data.a, is data.b"
    assert str(compare(one(), Lock(()))[0]) == "data: data.a is not in use any more"
    assert str(compare(Lock(()), one())[0]) == "data: data.a is new"


def test_local_code_is_pinned_by_its_file(tmp_path, data_source):
    (tmp_path / "mine.py").write_text(data_source)
    registry = Registry()
    registry.allow_local_code(LocalCode(tmp_path))
    choice = Choice(provider="./mine.py:Mine")
    before = pin(registry.resolve("data", choice).provider)
    (tmp_path / "mine.py").write_text(data_source + "\n# changed")
    (fault,) = compare(before, pin(registry.resolve("data", choice).provider))
    assert "(file) was sha256:" in str(fault)


def test_strict_refuses_what_is_only_told_otherwise():
    one = Lock((Locked("data", "data", "a", "apt-a", "1", "s", "o"),))
    assert len(check_lock(one, Lock(()), strict=False)) == 1
    assert check_lock(one, one, strict=True) == []
    with pytest.raises(CheckpointError, match=r"data: data\.a is not in use any more"):
        check_lock(one, Lock(()), strict=True)


@pytest.mark.parametrize("saved", [{"data": 3}, {"data": {"kind": "data"}}])
def test_a_damaged_lock_is_refused(saved):
    with pytest.raises(CheckpointError, match="the lock is damaged at data"):
        Lock.from_dict(saved)
