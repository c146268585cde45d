"""Options that are refused are explained: where, what, what would be right."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apt.core.options import canonical, explain


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
    return [str(fault) for fault in explain(caught.value, Options)]


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


@given(st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=3))))
def test_the_canonical_form_does_not_know_the_order_of_keys(options):
    assert canonical(options) == canonical(dict(reversed(list(options.items()))))


def test_the_canonical_form_tells_values_apart():
    assert len({canonical({"a": value}) for value in (1, "1", 1.5, True, None, [1], {"b": 1})}) == 7
