"""Mutated profiles: a good one is read, a wrong one is refused in words, and nothing else ever happens."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt.core import yaml
from apt.core.discovery import discover
from apt.core.profile import Profile, load_profile
from apt.core.registry import Registry
from apt.errors import ProfileError

GOOD: dict[str, object] = {
    "name": "good",
    "description": "a profile that uses every section",
    "plugins": [],
    "model": {
        "d_model": 32,
        "num_heads": 4,
        "num_layers": 2,
        "d_ff": 64,
        "max_seq_len": 16,
        "dropout": 0.1,
        "norm": "rmsnorm",
        "tie_embeddings": True,
        "attention": {"provider": "sdpa", "num_kv_heads": 2, "rope_theta": 1e4},
        "ffn": {"provider": "default", "bias": True},
    },
    "training": {"max_epochs": 2, "batch_size": 4, "learning_rate": 3e-4, "precision": "fp32", "betas": [0.9, 0.95]},
    "schedules": {},
    "data": {"source": "files", "path": "x.txt", "tokenizer": {"provider": "byte"}},
    "evaluation": {"max_batches": 3},
    "monitoring": {"log_every": 5},
    "hardware": {"device": "cpu"},
    "debug": {"detect_anomaly": False},
    "extra": {"mine": {"deep": [1, 2]}},
}
FREE = {"name", "description", "extra", "evaluation.sample_prompt", "data.path", "data.pattern", "version"}
"""What may be any text, or anything at all."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.sampled_from(["", "x", "sdpa", "moe", "true", "3", "${HOME:-y}", "\u202e", "a.b", "./x.py:Y", "none"])
)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab_", max_size=3), inner, max_size=3)
)


def paths(value: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [above] if above else []
    return [
        *([above] if above else []),
        *(path for key, inner in value.items() for path in paths(inner, (*above, key))),
    ]


PATHS = st.sampled_from(paths(GOOD))
CLOSED = st.sampled_from([path for path in paths(GOOD) if path[0] not in ("extra", "schedules")])


def holder(document: dict[str, object], path: tuple[str, ...]) -> dict[str, object]:
    inner = document
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[assignment]
    return inner


def read(folder: Path, document: dict[str, object]) -> Profile | None:
    path = folder / "x.yaml"
    path.write_text(yaml.dump(document))
    try:
        return load_profile(path, registry=Registry(discover))
    except ProfileError as error:
        told = [str(fault) for fault in error.faults]
    assert told
    assert all("x.yaml" in line for line in told)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


few = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def test_the_profile_that_is_mutated_is_good(folder: Path) -> None:
    assert read(folder, GOOD) is not None


@few
@given(PATHS, ANY)
def test_any_value_anywhere_is_read_or_refused(folder: Path, path: tuple[str, ...], value: object) -> None:
    document = copy.deepcopy(GOOD)
    holder(document, path)[path[-1]] = value
    read(folder, document)


@few
@given(st.lists(st.tuples(PATHS, ANY), min_size=2, max_size=5))
def test_many_changes_at_once_are_read_or_refused(folder: Path, changes: list[tuple[tuple[str, ...], object]]) -> None:
    document = copy.deepcopy(GOOD)
    for path, value in changes:
        try:
            holder(document, path)[path[-1]] = value
        except (KeyError, TypeError):
            continue  # an earlier change took the place away
    read(folder, document)


@few
@given(CLOSED, st.text("abcdefgh_", min_size=1, max_size=8))
def test_an_unknown_key_is_never_accepted(folder: Path, path: tuple[str, ...], key: str) -> None:
    document = copy.deepcopy(GOOD)
    inner = holder(document, path)
    inner[key + "_zz"] = 1
    assert read(folder, document) is None


@few
@given(CLOSED.filter(lambda path: ".".join(path) not in FREE), st.data())
def test_a_value_of_another_type_is_never_accepted(folder: Path, path: tuple[str, ...], data: st.DataObject) -> None:
    document = copy.deepcopy(GOOD)
    inner = holder(document, path)
    old = inner[path[-1]]
    wrong: dict[type, list[object]] = {
        bool: [1, 0, "true", [True], {"a": True}, 0.0],
        int: ["4", True, [4], {"a": 4}, 4.5, -1],
        float: ["0.1", True, [0.1], {"a": 0.1}, -1.0],
        str: [3, True, [3], {"zz": 1}, "zz"],
        list: [3, "zz", {"zz": 1}, [[]]],
        dict: [3, True, [3], "zz", 1.5],
    }
    inner[path[-1]] = data.draw(st.sampled_from(wrong[type(old)]))
    assert read(folder, document) is None


@few
@given(CLOSED)
def test_what_is_left_out_has_its_default_or_is_asked_for(folder: Path, path: tuple[str, ...]) -> None:
    document = copy.deepcopy(GOOD)
    del holder(document, path)[path[-1]]
    profile = read(folder, document)
    needed = {("model", "attention"), ("model", "attention", "provider"), ("data", "path"), ("training", "max_epochs")}
    if profile is None:
        assert path in needed | {("model",), ("training",), ("model", "num_heads"), ("data", "source")}
