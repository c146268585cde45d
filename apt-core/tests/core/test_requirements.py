"""Requirements are checked by `packaging` against what is installed."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from apt.core.discovery import discover
from apt.core.requirements import InvalidRequirement, check_record, check_requirements, install_line


def test_what_is_installed_in_a_fitting_version_is_no_fault():
    assert check_requirements(["pydantic>=2", "packaging"]) == []


def test_what_is_missing_is_named_with_the_line_that_installs_it():
    (unmet,) = check_requirements(["no-such-thing>=1.9"])
    assert str(unmet) == "no-such-thing>=1.9, which is not installed"
    assert install_line([unmet]) == "pip install 'no-such-thing>=1.9'"


def test_a_version_that_does_not_fit_is_named_with_the_one_that_is_there():
    (unmet,) = check_requirements(["pydantic<1"])
    assert str(unmet) == f"pydantic<1, but pydantic {version('pydantic')} is installed"


def test_a_marker_that_does_not_hold_asks_for_nothing():
    assert check_requirements(["no-such-thing; python_version < '3'"]) == []
    assert check_requirements(["no-such-thing; extra == 'gpu'"]) == []
    assert len(check_requirements(["no-such-thing; extra == 'gpu'"], extras=["gpu"])) == 1


def test_extras_of_a_requirement_are_followed_through_its_distribution(site):
    site.add("apt-a", {}, requires=["no-such-thing; extra == 'gpu'", "apt-a[gpu]; extra == 'all'"])
    assert check_requirements(["apt-a"]) == []
    assert [unmet.distribution for unmet in check_requirements(["apt-a[all]"])] == ["no-such-thing"]


def test_extras_that_name_one_another_end(site):
    site.add("apt-a", {}, requires=["apt-a[y]; extra == 'x'", "apt-a[x]; extra == 'y'"])
    assert check_requirements(["apt-a[x]"]) == []


def test_pytorch_that_is_absent_is_needed_only_to_build(monkeypatch):
    from importlib import metadata

    real = metadata.distribution

    def without_torch(name: str) -> metadata.Distribution:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "distribution", without_torch)
    assert check_requirements(["torch>=2.9"]) == []
    monkeypatch.undo()
    assert len(check_requirements(["torch>=900"])) == 1


def test_a_pre_release_that_is_installed_counts(site):
    site.add("apt-pre", {}, version="2.0rc1")
    assert check_requirements(["apt-pre>=1.5"]) == []
    assert len(check_requirements(["apt-pre>=2.0"])) == 1


def test_a_record_answers_for_its_distribution_and_its_own_extra(site):
    site.add("apt-a", {"data.plain": "a:X", "data.fast": "a:Y [fast]"}, requires=["no-such-thing; extra == 'fast'"])
    plain, fast = sorted(discover([str(site.folder)]).records, key=lambda record: record.name, reverse=True)
    assert check_record(plain) == []
    assert [unmet.requirement for unmet in check_record(fast)] == ["no-such-thing"]


def test_what_is_no_requirement_is_refused():
    with pytest.raises(InvalidRequirement):
        check_requirements([">=1.0 what"])
