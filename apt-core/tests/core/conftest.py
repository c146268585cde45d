"""Packages made on the spot: real dist-info folders and modules in a temporary folder on `sys.path`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from apt.core.discovery import discover
from apt.core.registry import Registry

DATA_SOURCE = '''
from apt.core.providers import DataProvider
from pydantic import Field

class Mine(DataProvider):
    """Makes nothing up."""
    size: int = Field(default=3, ge=1)
    shuffle: bool = False

    def read(self):
        return []
'''


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        distribution: str,
        entry_points: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        requires: Sequence[str] = (),
        extras: Sequence[str] = (),
    ) -> Path:
        """Install a distribution; `modules` maps dotted names to source, packages are made as needed."""
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n\nA description.\n")
        entries = "".join(f"{name} = {target}\n" for name, target in entry_points.items())
        (info / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n[apt.providers]\n{entries}")
        for name, source in (modules or {}).items():
            *parents, last = name.split(".")
            folder = self.folder
            for parent in parents:
                folder /= parent
                folder.mkdir(exist_ok=True)
                (folder / "__init__.py").touch()
            (folder / f"{last}.py").write_text(textwrap.dedent(source))
        return info

    def registry(self) -> Registry:
        """A fresh registry of these packages alone."""
        return Registry(lambda: discover([str(self.folder)]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A temporary folder of packages, first on `sys.path`; what was imported from it is forgotten afterwards."""
    for variable in ("APT_DISABLE_PLUGINS", "APT_ONLY_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def data_source() -> str:
    """The source of a small data provider, the class `Mine`."""
    return DATA_SOURCE
