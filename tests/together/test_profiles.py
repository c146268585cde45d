"""The profiles of the repository: each is valid, keeps its meaning through a round trip, fits the schema, and can be built."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import torch

from apt.core import yaml
from apt.core.estimate import estimate
from apt.core.profile import dump_profile, load_profile
from apt.core.schema import profile_schema
from apt.modeling.compose import ModelBuilder

PROFILES = Path(__file__).parents[2] / "profiles"
NAMES = sorted(path.name for path in PROFILES.glob("*.yaml"))


def test_the_profiles_that_the_project_promises_are_there() -> None:
    promised = {"core", "quickstart", "tiny_debug", "gpt5_moe_reasoning", "gpt5_moe_reasoning_small"}
    assert promised <= {name.removesuffix(".yaml") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_its_own_canonical_form(name: str, tmp_path: Path) -> None:
    config = load_profile(PROFILES / name).config
    again = tmp_path / "again.yaml"
    again.write_text(dump_profile(config))
    assert load_profile(again).config == config


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_fits_the_schema(name: str) -> None:
    schema, left_out = profile_schema()
    assert left_out == []
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.read_file(PROFILES / name).values, schema)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_can_be_built_and_has_the_parameters_that_check_foretells(name: str) -> None:
    profile = load_profile(PROFILES / name)
    with torch.device("meta"):
        model = ModelBuilder(profile.config, resolved=profile.resolved).build_model()
    assert profile.resolved is not None
    cost = estimate(profile.config, profile.resolved)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.parameters


def test_the_predecessors_form_means_the_same_as_todays(tmp_path: Path) -> None:
    old = load_profile(PROFILES / "gpt5_moe_reasoning.yaml")
    assert old.notes
    new = tmp_path / "new.yaml"
    new.write_text(dump_profile(old.config))
    assert load_profile(new).notes == ()
    assert load_profile(new).config == old.config
