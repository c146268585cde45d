"""Discovery reads metadata, in an order of its own, and imports nothing."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core.discovery import discover, find_source, normalise


def test_records_carry_distribution_version_entry_point_and_path(site):
    info = site.add("apt-one", {"data.one": "apt_one.provider:One [fast, gpu]"}, version="2.3")
    (record,) = discover([str(site.folder)]).records
    assert (record.kind, record.name, record.distribution, record.version) == ("data", "one", "apt-one", "2.3")
    assert (record.entry_point, record.path, record.extras) == ("apt_one.provider:One", str(info), ("fast", "gpu"))


def test_nothing_is_imported(site):
    site.add("apt-loud", {"data.loud": "apt_loud:Loud"}, {"apt_loud": "raise SystemExit('imported')"})
    assert len(discover().records) >= 1
    assert "apt_loud" not in sys.modules


def test_apt_cores_own_providers_come_through_the_same_door():
    own = {record.key for record in discover().records if record.distribution == "apt-core"}
    assert {"attention.sdpa", "ffn.default", "data.stdlib", "tokenizer.byte"} <= own


def test_the_order_does_not_depend_on_the_file_system(site, monkeypatch):
    for name in ("zeta", "alpha", "mid"):
        site.add(f"apt-{name}", {f"data.{name}": f"{name}:X", "data.shared": f"{name}:Y"})
    import os

    listdir = os.listdir
    found = discover([str(site.folder)])
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    assert discover([str(site.folder)]) == found
    claims = [record.distribution for record in found.records if record.name == "shared"]
    assert claims == ["apt-alpha", "apt-mid", "apt-zeta"]


def test_the_first_distribution_of_a_name_on_the_path_counts(site, tmp_path):
    site.add("apt-one", {"data.one": "new:X"}, version="2.0")
    other = tmp_path / "other"
    other.mkdir()
    (site.folder / "apt_one-2.0.dist-info").rename(other / "apt_one-2.0.dist-info")
    site.add("apt-one", {"data.one": "old:X"}, version="1.0")
    assert [record.version for record in discover([str(other), str(site.folder)]).records] == ["2.0"]
    assert [record.version for record in discover([str(site.folder), str(other)]).records] == ["1.0"]


def test_a_newer_version_without_the_entry_point_hides_an_older_one(site, tmp_path):
    site.add("apt-one", {"data.one": "old:X"}, version="1.0")
    newer = tmp_path / "newer" / "apt_one-2.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Name: apt-one\nVersion: 2.0\n")
    assert discover([str(newer.parent), str(site.folder)]).records == ()


def test_one_folder_by_two_names_is_one_folder(site, tmp_path):
    site.add("apt-one", {"data.one": "one:X"})
    (tmp_path / "lib64").symlink_to(site.folder)
    assert len(discover([str(site.folder), str(tmp_path / "lib64")]).records) == 1


def test_a_zip_file_on_the_path_is_read_too(tmp_path):
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("apt_zip-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: apt-zip\nVersion: 1.0\n")
        file.writestr("apt_zip-1.0.dist-info/entry_points.txt", "[apt.providers]\ndata.zipped = apt_zip:X\n")
    (record,) = discover([str(archive)]).records
    assert (record.key, record.distribution, record.version) == ("data.zipped", "apt-zip", "1.0")


def test_a_finder_of_ones_own_is_asked_too(site, monkeypatch, tmp_path):
    from importlib.metadata import PathDistribution

    info = site.add("apt-hooked", {"data.hooked": "hooked:X"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    info = info.rename(elsewhere / info.name)
    finder = SimpleNamespace(find_spec=lambda *_: None, find_distributions=lambda context: [PathDistribution(info)])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    assert "data.hooked" in {record.key for record in discover().records}


@pytest.mark.parametrize("entry", ["nodot = a:B", "data. = a:B", "data.x = a", "data.x = a:B:C", "data.x"])
def test_an_entry_point_that_is_not_well_formed_costs_itself_alone(site, entry):
    info = site.add("apt-one", {"data.one": "one:X"})
    (info / "entry_points.txt").write_text(f"[apt.providers]\n{entry}\ndata.one = one:X\n")
    found = discover([str(site.folder)])
    assert [record.key for record in found.records] == ["data.one"]
    assert "apt-one 1.0" in found.faults[0].where


@given(st.text(max_size=200))
def test_any_entry_points_file_is_survived(tmp_path_factory, text):
    info = tmp_path_factory.mktemp("fuzz") / "apt_x-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[apt.providers]\n" + text, encoding="utf-8", errors="surrogatepass")
    found = discover([str(info.parent)])
    assert all(record.distribution == "apt-x" and record.kind and record.name for record in found.records)


def test_names_of_distributions_have_one_spelling():
    assert {normalise(name) for name in ("Apt_MoE", "apt.moe", "APT--moe")} == {"apt-moe"}


def test_source_is_found_without_importing(site):
    site.add("apt-deep", {}, {"apt_deep.layers.provider": "raise RuntimeError", "apt_flat": "raise RuntimeError"})
    assert find_source("apt_deep.layers.provider:X") == site.folder / "apt_deep"
    assert find_source("apt_flat:X") == site.folder / "apt_flat.py"
    assert find_source("apt_nowhere.provider:X") is None
    assert "apt_deep" not in sys.modules


def test_in_a_namespace_package_the_source_is_the_first_package_with_code(site):
    package = site.folder / "aptspace" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "provider.py").touch()
    assert find_source("aptspace.mine.provider:X") == package
    assert isinstance(find_source("aptspace.mine.provider:X"), Path)
