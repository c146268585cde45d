"""The JSON Schema of profiles: of exactly what is installed, third parties' options and values included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jsonschema
import pytest
from pydantic import Field

from apt.core.discovery import discover
from apt.core.provider import Slot
from apt.core.providers import FFNProvider, Plugin
from apt.core.registry import Registry
from apt.core.schema import profile_schema


class Theirs(FFNProvider):
    """A third party's network."""

    scheduled: ClassVar[Mapping[str, str]] = {"their_gain": "gain"}
    depth: int = Field(default=2, ge=1, le=9, description="how deep it goes")
    inner: Slot[FFNProvider] = "default"  # type: ignore[assignment]

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        raise NotImplementedError

    def get_parameter_count(self, d_model, d_ff):
        raise NotImplementedError

    def get_flops_estimate(self, seq_len, d_model, d_ff):
        raise NotImplementedError

    def get_memory_estimate(self, seq_len, d_model, d_ff, batch_size=1):
        raise NotImplementedError


class TheirPlugin(Plugin):
    """A third party's plugin."""

    folder: str = "x"


@pytest.fixture(scope="module")
def validator() -> Any:
    registry = Registry(discover)
    registry.register("ffn", "theirs", Theirs)
    registry.register("plugin", "their_plugin", TheirPlugin)
    schema, _ = profile_schema(registry)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    "profile",
    [
        {},
        {"model": {"ffn": "theirs"}},
        {"model": {"ffn": {"provider": "theirs", "depth": 3, "inner": {"provider": "theirs", "inner": "default"}}}},
        {"model": {"ffn": {"provider": "./mine.py:Mine", "anything": 1}}},
        {"model": {"attention": {"provider": "sdpa", "fallback": ["sdpa"]}, "d_model": 8}},
        {"plugins": ["their_plugin"], "schedules": {"enable_their_plugin_at_epoch": 2}},
        {"plugins": [{"their_plugin": {"folder": "y"}}]},
        {"schedules": {"their_gain": {"start": 1, "end": 2, "by": "step"}}},
        {"schedules": {"their_gain": [{"until": 3, "start": 1, "end": 2}, {"start": 2, "end": 2}]}},
        {"data": {"source": "files", "path": "x", "tokenizer": "byte"}, "training": {"learning_rate": 1e-3}},
        {"training": {"save_every": "10 min"}},
        {"base": "x.yaml", "model": {"ffn": {"depth": 3}, "align": None}, "data": {"path": "y"}},
        {"schedules": {"their_gain": None, "enable_their_plugin_at_epoch": None}},
        {"plugins": ["./mine.py:Mine", {"./mine.py:Other": {"anything": 1}}]},
        {"data": {"source": "./mine.py:Mine", "anything": 1, "tokenizer": "byte"}},
        {"monitoring": {"loggers": ["./mine.py:Mine"]}},
        {"schedules": None, "training": None, "plugins": None, "data": None, "model": None},
        {"training": {"max_steps": "${STEPS}", "compile": "${FAST:-false}", "precision": "${PRECISION}"}},
        {"training": {"save_every": "${MINUTES} min", "betas": ["${B:-0.9}", 0.95]}},
        {"model": {"ffn": {"provider": "theirs", "depth": "${DEPTH:-3}"}}},
        {"schedules": {"enable_their_plugin_at_epoch": "${E}", "their_gain": {"start": "${A}", "end": 2}}},
    ],
)
def test_what_is_right_fits(validator: Any, profile: dict[str, object]) -> None:
    validator.validate(profile)


def test_a_provider_whose_options_have_no_schema_is_left_out_and_named() -> None:
    class Odd(Theirs):
        "Options that no JSON value can be."

        call: Callable[[int], int] = abs

    registry = Registry(discover)
    registry.register("ffn", "odd", Odd)
    schema, left_out = profile_schema(registry)
    assert left_out == [
        "ffn.odd: its options have no JSON Schema: Cannot generate a JsonSchema for core_schema.CallableSchema"
    ]
    assert "swiglu" in schema["$defs"]["ffn"]["anyOf"][0]["anyOf"][0]["enum"]


@pytest.mark.parametrize(
    "profile",
    [
        {"modle": {}},
        {"model": {"d_modle": 3}},
        {"model": {"d_model": "3"}},
        {"model": {"ffn": "thiers"}},
        {"model": {"ffn": {"provider": "theirs", "depht": 3}}},
        {"model": {"ffn": {"provider": "theirs", "depth": 10}}},
        {"model": {"ffn": {"provider": "theirs", "inner": {"provider": "default", "biass": True}}}},
        {"plugins": ["thier_plugin"]},
        {"plugins": [{"their_plugin": {"foldr": "y"}}]},
        {"schedules": {"their_gian": {"start": 1, "end": 2}}},
        {"schedules": {"their_gain": {"start": 1}}},
        {"schedules": {"enable_thiers_at_epoch": 2}},
        {"data": {"source": "files"}},
        {"data": {"pth": "x"}},
        {"base": "x.yaml", "model": {"ffn": {"depht": 3}}},
        {"training": {"save_every": "10 hours"}},
        {"training": 3},
        {"training": {"max_steps": "$STEPS"}},
        {"training": {"max_steps": 0}},
        {"training": {"compile": "yes"}},
        {"name": None},
    ],
)
def test_what_is_wrong_does_not(validator: Any, profile: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(profile)
