"""What the looking commands print for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt.cli import main
from apt.core.doctor import Diagnosis, Finding

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


def test_one_provider_is_an_object_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    shown = read(capsys, "providers", "show", "ffn.default", "--json")
    assert isinstance(shown, dict)
    assert (shown["name"], shown["distribution"], shown["scheduled_values"]) == ("default", "apt-core", [])
    (bias,) = shown["options"]
    assert (bias["option"], bias["type"], bias["default"]) == ("bias", "true or false", "false")


def test_the_doctors_findings_are_objects_and_the_exit_code_says_whether_there_is_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = (
        Finding("attention.sdpa", "apt-core 1", "ok", ""),
        Finding("command.train", "apt-x 1", "ok", ""),  # a name that apt-core has itself
        Finding("data.slow", "apt-y 2", "warning", "takes 3.0 s to import"),
    )
    limits: list[float] = []

    def diagnose(*, time_limit: float) -> Diagnosis:
        limits.append(time_limit)
        return Diagnosis({"python": "3.11"}, findings)

    monkeypatch.setattr("apt.core.doctor.diagnose", diagnose)
    assert main(["doctor", "--json", "--time-limit", "3"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["healthy"], found["environment"], limits) == (False, {"python": "3.11"}, [3.0])
    assert [each["level"] for each in found["findings"]] == ["ok", "fault", "warning"]
    assert found["findings"][2] == {
        "subject": "data.slow",
        "distribution": "apt-y 2",
        "level": "warning",
        "what": "takes 3.0 s to import",
    }
    monkeypatch.setattr("apt.core.doctor.diagnose", lambda time_limit: Diagnosis({}, findings[::2]))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True


@pytest.mark.skipif(not PROFILE.is_file(), reason="the repository's profiles are not here")
def test_a_checked_profile_is_an_object_of_its_costs_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    found = read(capsys, "check", str(PROFILE), "--json")
    assert isinstance(found, dict)
    cost = found["cost"]
    assert cost["parameters"] == sum(part["parameters"] for part in cost["parts"]) > 0
    assert {"model.attention", "model.ffn", "data", "data.tokenizer"} == {each["where"] for each in found["providers"]}
