"""Hostile packages cost themselves alone, and the doctor calls each by its name."""

from __future__ import annotations

import sys

import pytest

from apt.core.discovery import discover
from apt.core.doctor import Finding, diagnose
from apt.core.registry import Registry
from apt.errors import ProviderBrokenError, ProviderCollisionError, ProviderError, RequirementError

PLUGIN = """
from apt.core.providers import Plugin
from apt.hookspecs import hookimpl

class Mine(Plugin):
    @hookimpl
    def apt_step_end(self, state, metricks):
        pass
"""


def install_hostile(site, data_source: str) -> None:
    """Eight packages, each with one thing wrong with it."""
    fake = site.folder.parent / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("")  # the real one is slow, and any module of that name tells
    other_level = data_source.replace("    size:", "    api_level: 'ClassVar[int]' = 9\n    size:")
    sources = {
        "raises": "raise RuntimeError('boom')",
        "torchy": f"import sys\nsys.path.insert(0, {str(fake)!r})\nimport torch\n{data_source}",
        "taker": data_source,
        "wrongbase": "class Mine: pass",
        "needy": data_source,
        "oldapi": f"from typing import ClassVar\n{other_level}",
        "hangs": "import time\ntime.sleep(30)",
    }
    for name, source in sources.items():
        requires = ["no-such-thing>=1"] if name == "needy" else []
        site.add(f"apt-{name}", {f"data.{name}": f"apt_{name}:Mine"}, {f"apt_{name}": source}, requires=requires)
    site.add("apt-taker-two", {"data.taker": "apt_taker_two:Mine"}, {"apt_taker_two": data_source})
    site.add("apt-hooky", {"plugin.hooky": "apt_hooky:Mine"}, {"apt_hooky": PLUGIN})


def test_each_of_eight_hostile_packages_is_diagnosed_by_name_and_the_others_are_well(site, data_source):
    install_hostile(site, data_source)
    site.add("apt-dies", {"data.dies": "apt_dies:Mine"}, {"apt_dies": "import os\nos._exit(7)"})
    entries = {"data.fine": "apt_fine:Mine", "data.bad": "apt_bad:Mine", "data.odd": "nothing"}
    site.add("apt-fine", entries, {"apt_fine": f"print('hello')\n{data_source}", "apt_bad": "1/0"})
    found = diagnose(time_limit=4)
    told: dict[str, list[Finding]] = {}
    for finding in found.findings:
        told.setdefault(finding.subject.partition(":")[0], []).append(finding)

    def only(subject: str) -> Finding:
        (finding,) = told[subject]
        return finding

    assert only("data.raises").what.endswith("RuntimeError: boom")
    assert (only("data.torchy").level, only("data.torchy").what[:13]) == ("warning", "imports torch")
    assert [finding.distribution for finding in told["data.taker"]] == ["apt-taker 1.0", "apt-taker-two 1.0"]
    assert "is claimed by apt-taker 1.0 and apt-taker-two 1.0" in told["data.taker"][0].what
    assert "class Mine is not a subclass of apt.core.providers.data.DataProvider" in only("data.wrongbase").what
    assert "pip install 'no-such-thing>=1'" in only("data.needy").what
    assert "API level 9 of apt-core; this apt-core has level 1" in only("data.oldapi").what
    assert "has no argument 'metricks'; did you mean 'metrics'?" in only("plugin.hooky").what
    assert only("data.hangs").what == "importing apt_hangs:Mine takes longer than 4 s"
    assert only("data.dies").what == "the interpreter ended (exit code 7) while importing apt_dies:Mine"
    assert "ZeroDivisionError" in only("data.bad").what
    assert told["apt-fine 1.0"][0].level == "fault"
    assert only("data.fine") == Finding("data.fine", "apt-fine 1.0", "ok", "")
    assert {only(f"data.{name}").level for name in ("raises", "wrongbase", "needy", "oldapi", "hangs")} == {"fault"}
    for own in ("attention.sdpa", "data.stdlib", "tokenizer.byte"):
        assert only(own).level == "ok"
    assert not found.healthy
    assert not any(name.startswith("apt_") and name in sys.modules for name in ("apt_hangs", "apt_dies", "apt_raises"))


def test_who_does_not_ask_for_them_does_not_notice_them(site, data_source):
    install_hostile(site, data_source)
    site.add("apt-fine", {"data.fine": "apt_fine:Mine"}, {"apt_fine": data_source})
    registry = site.registry()
    assert len(registry.list_providers()["data"]) == 8
    assert registry.get("data", "fine", fallback=False).size == 3
    assert not any(name.startswith("apt_") and name != "apt_fine" for name in sys.modules if site_has(site, name))


def site_has(site, module: str) -> bool:
    return (site.folder / f"{module}.py").exists()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", ProviderBrokenError),
        ("taker", ProviderCollisionError),
        ("wrongbase", ProviderBrokenError),
        ("needy", RequirementError),
        ("oldapi", ProviderBrokenError),
    ],
)
def test_who_asks_for_one_gets_an_error_that_names_it(site, data_source, name, error):
    install_hostile(site, data_source)
    with pytest.raises(error) as caught:
        site.registry().get("data", name, fallback=False)
    assert isinstance(caught.value, ProviderError)
    assert f"apt-{name}" in str(caught.value)


def test_what_is_disabled_is_told_and_a_variable_that_names_nothing_is_a_fault(site, monkeypatch, data_source):
    site.add("apt-off", {"data.off": "apt_off:Mine"}, {"apt_off": "raise SystemExit"})
    monkeypatch.setattr("apt.core.doctor.discover", lambda: discover([str(site.folder)]))
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "apt-off")
    (finding,) = diagnose().findings
    assert (finding.subject, finding.level, finding.what) == (
        "data.off",
        "warning",
        "disabled: APT_DISABLE_PLUGINS names it",
    )
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "apt-of")
    findings = {finding.subject: finding for finding in diagnose().findings}
    assert findings["environment"].level == "fault"
    assert "did you mean 'apt-off'?" in findings["environment"].what


def test_what_is_optional_and_missing_is_a_warning_not_a_fault(site, monkeypatch, data_source):
    needy = data_source + "\n    @classmethod\n    def get_dependencies(cls):\n        return ['no-such-thing']\n"
    required = data_source.replace("Field(default=3, ge=1)", "Field(ge=1)")
    site.add(
        "apt-a",
        {"data.extra": "apt_a:Mine [fast]", "data.needy": "apt_needy:Mine", "data.must": "apt_must:Mine"},
        {"apt_a": data_source, "apt_needy": needy, "apt_must": required},
        requires=["no-such-thing; extra == 'fast'"],
        extras=["fast"],
    )
    found = {finding.subject: finding for finding in diagnose().findings}
    assert found["data.extra"].level == found["data.needy"].level == "warning"
    assert "pip install no-such-thing" in found["data.needy"].what
    assert found["data.must"].level == "ok"


def test_a_plugin_that_must_be_given_options_is_examined_too_and_damaged_metadata_is_a_fault(site, data_source):
    must = PLUGIN.replace("    @hookimpl", "    must: int\n\n    @hookimpl")
    site.add("apt-must", {"plugin.must": "apt_must:Mine"}, {"apt_must": must})
    site.add("apt-torn", {"data.torn": "apt_torn:Mine"}, {"apt_torn": data_source}, requires=["not a ~ requirement"])
    (site.add("apt-bare", {"data.bare": "apt_bare:Mine"}, {"apt_bare": data_source}) / "METADATA").unlink()
    found = {finding.subject: finding for finding in diagnose().findings}
    assert "has no argument 'metricks'" in found["plugin.must"].what
    assert (found["data.torn"].level, "its metadata is damaged" in found["data.torn"].what) == ("fault", True)
    assert found["data.bare"].level == "ok"


def test_a_fresh_registry_of_what_is_installed_is_one_line():
    assert "sdpa" in Registry(discover).list_providers("attention")["attention"]
