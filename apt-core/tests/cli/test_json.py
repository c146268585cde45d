"""What the looking commands print for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt.cli import main

PROFILE = Path(__file__).parents[3] / "profiles" / "core.yaml"


def read(capsys: pytest.CaptureFixture[str], *words: str) -> object:
    assert main(list(words)) == 0
    return json.loads(capsys.readouterr().out)


def test_providers_are_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(capsys, "providers", "attention", "--json")
    assert isinstance(rows, list)
    (sdpa,) = [row for row in rows if row["name"] == "sdpa"]
    assert (sdpa["distribution"], sdpa["default"]) == ("apt-core", True)
    assert sdpa["state"] in ("loaded", "not loaded")


@pytest.mark.skipif(not PROFILE.is_file(), reason="the repository's profiles are not here")
def test_a_checked_profile_is_an_object_of_its_costs_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    found = read(capsys, "check", str(PROFILE), "--json")
    assert isinstance(found, dict)
    cost = found["cost"]
    assert cost["parameters"] == sum(part["parameters"] for part in cost["parts"]) > 0
    assert {"model.attention", "model.ffn", "data", "data.tokenizer"} == {each["where"] for each in found["providers"]}
