"""Exclusions hold in both directions, for the profile as a whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apt.core.exclusions import Used, check_form, find_conflicts

names = st.sampled_from(["a.x", "a.y", "b.x", "b.y"])
words = st.one_of(names, st.sampled_from(["a", "b", "capability:odd", "capability:even"]))


@st.composite
def used(draw: st.DrawFn) -> Used:
    kind, _, name = draw(names).partition(".")
    capabilities = frozenset(draw(st.lists(st.sampled_from(["odd", "even"]), max_size=2)))
    return Used(draw(st.text(max_size=3)), kind, name, tuple(draw(st.lists(words, max_size=2))), capabilities)


@given(st.lists(used(), max_size=6))
def test_the_number_of_conflicts_does_not_depend_on_the_order(parts):
    assert len(find_conflicts(parts)) == len(find_conflicts(reversed(parts)))


@given(st.lists(used(), max_size=6))
def test_no_conflict_means_that_no_pair_excludes_one_another(parts):
    def excludes(one: Used, other: Used) -> bool:
        others = {other.kind, f"{other.kind}.{other.name}", *(f"capability:{word}" for word in other.capabilities)}
        return bool(others & set(one.excludes))

    pairs = sum(excludes(one, other) or excludes(other, one) for i, one in enumerate(parts) for other in parts[i + 1 :])
    assert len(find_conflicts(parts)) == pairs


def test_nothing_excludes_itself():
    assert find_conflicts([Used("", "a", "x", ("a", "a.x", "capability:odd"), frozenset({"odd"}))]) == []


def test_what_the_profile_rules_out_is_a_conflict_with_its_reason():
    (fault,) = find_conflicts([Used("model.ffn", "ffn", "x", (), frozenset({"noncausal"}))], {"noncausal": "no"})
    assert str(fault) == "model.ffn: ffn.x is noncausal; no"


def test_a_bare_word_is_a_kind_or_a_name_of_the_same_kind():
    assert check_form(["ffn", "flash", "ffn:moe", "ffn.moe", "capability:odd"], "attention", ["attention", "ffn"]) == (
        "ffn",
        "attention.flash",
        "ffn.moe",
        "ffn.moe",
        "capability:odd",
    )
