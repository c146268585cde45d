"""Options that are refused are explained: where, what, what would be right."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apt.core.options import canonical, explain, mistyped


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 1


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rank: int = Field(default=4, ge=1)
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = Inner()
    must: int

    @model_validator(mode="after")
    def _fits(self):
        if self.rank > 100:
            raise ValueError("rank and must do not fit")
        return self


def faults(**options: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Options.model_validate(options)
    return [str(fault) for fault in explain(caught.value, Options, options)]


def test_each_fault_says_where_what_and_what_would_be_right():
    assert faults(rnk=1, rank=0, mode="slow", inner={"widht": 2}) == [
        "rank: 0 is not allowed; input should be greater than or equal to 1",
        "mode: 'slow' is not allowed; input should be 'fast' or 'exact'",
        "inner.widht: no such option; did you mean 'width'? options: width",
        "must: must be given",
        "rnk: no such option; did you mean 'rank'? options: rank, mode, inner, must",
    ]


def test_a_fault_of_the_whole_has_no_path_of_its_own():
    assert faults(rank=101, must=1) == [": rank and must do not fit"]


def test_an_option_without_a_name_is_no_option():
    assert faults(**{"": None, "must": 1}) == [": no such option; options: rank, mode, inner, must"]


@given(st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=3))))
def test_the_canonical_form_does_not_know_the_order_of_keys(options):
    assert canonical(options) == canonical(dict(reversed(list(options.items()))))


def test_the_canonical_form_tells_values_apart():
    assert len({canonical({"a": value}) for value in (1, "1", 1.5, True, None, [1], {"b": 1})}) == 7


class Types(BaseModel):
    count: int = 1
    share: float | None = None
    rank: Annotated[int, Field(ge=1)] = 1
    fast: bool = False
    mode: int | Literal["auto"] = "auto"
    text: str = ""
    pair: tuple[float, float] = (0.0, 0.0)
    tri: bool | int = 0
    names: list[str] = []
    bare: list = []


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"count": True}, "a whole number"),
        ({"share": False}, "a number or null"),
        ({"rank": "4"}, "a whole number"),
        ({"mode": True}, "a whole number"),
        ({"fast": 1}, "true or false"),
        ({"fast": "yes"}, "true or false"),
    ],
)
def test_no_value_becomes_another_type_in_silence(options, hint):
    (fault,) = mistyped(Types, options)
    assert (fault.where, fault.hint) == (next(iter(options)), f"input should be {hint}")


def test_a_wrong_type_inside_a_list_is_found():
    assert [fault.where for fault in mistyped(Types, {"pair": [0.9, True]})] == ["pair.1"]


def test_what_is_of_its_type_passes():
    right = {"count": 2, "share": 1, "rank": 3, "fast": True, "mode": "auto", "text": "4", "pair": [1, 2], "tri": True}
    right |= {"names": ["4"], "bare": ["4", True]}
    assert mistyped(Types, right) == []
    assert mistyped(Types, {"share": None, "mode": 3, "unknown": 1, "count": 2.0}) == []
