"""Importing apt is cheap, and the kernel needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import apt


def test_the_version_is_that_of_the_distribution():
    assert apt.__version__ == version("apt-core")


def test_there_is_nothing_else_in_the_package_itself():
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        print(apt.version)


def test_names_of_the_kernel_are_those_of_its_modules():
    import apt.core
    from apt.core import registry
    from apt.core.registry import registry as in_its_module

    assert registry is in_its_module
    for name in apt.core.__all__:
        assert getattr(apt.core, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        print(apt.core.Nothing)


@pytest.mark.parametrize(
    "statement",
    [
        "import apt",
        "from apt.core import registry, Provider, APTConfig, Schedule; registry.list_providers()",
        "from apt.core import APTConfig, resolve_config; resolve_config(APTConfig(attention_name='sdpa'))",
        "from apt.core.registry import registry; [registry.load(r.kind, r.name) for r in registry.records()"
        " if r.distribution == 'apt-core']",
    ],
)
def test_the_kernel_works_without_pytorch(statement):
    code = f"import sys; sys.modules['torch'] = None; {statement}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_apt_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import apt; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if not name.startswith("__")] == ["apt"]
