"""Eight hostile packages, installed by pip beside everything else: no profile notices them, and the doctor names each."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = """
from typing import ClassVar
from apt.core.providers import DataProvider

class Mine(DataProvider):
    api_level: ClassVar[int] = {level}

    def read(self):
        return []
"""
HOOKY = """
from apt.core.providers import Plugin
from apt.hookspecs import hookimpl

class Mine(Plugin):
    @hookimpl
    def apt_step_end(self, state, metricks):
        pass
"""
GOOD = DATA.format(level=1)
TORCH = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')  # the real one is slow\nimport torch\n"
PACKAGES = {
    "raises": ("data.raises", "raise RuntimeError('boom')", ""),
    "torchy": ("data.torchy", TORCH + GOOD, ""),
    "taker": ("attention.sdpa", GOOD, ""),
    "wrongbase": ("data.wrongbase", "class Mine: pass", ""),
    "needy": ("data.needy", GOOD, "Requires-Dist: no-such-thing>=1\n"),
    "oldapi": ("data.oldapi", DATA.format(level=9), ""),
    "hooky": ("plugin.hooky", HOOKY, ""),
    "hangs": ("data.hangs", "import time\ntime.sleep(30)", ""),
}
TOLD = {
    "data.raises": "RuntimeError: boom",
    "data.torchy": "imports torch when it is described",
    "attention.sdpa": "is claimed by apt-core",
    "data.wrongbase": "is not a subclass of apt.core.providers.data.DataProvider",
    "data.needy": "pip install 'no-such-thing>=1'",
    "data.oldapi": "API level 9 of apt-core; this apt-core has level 1",
    "plugin.hooky": "has no argument 'metricks'; did you mean 'metrics'?",
    "data.hangs": "takes longer than 8 s",
}


def wheel(folder: Path, name: str) -> Path:
    """A wheel as a build tool writes it."""
    entry, source, requires = PACKAGES[name]
    path, info = folder / f"apt_{name}-1.0-py3-none-any.whl", f"apt_{name}-1.0.dist-info"
    files = {
        f"apt_{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: apt-{name}\nVersion: 1.0\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[apt.providers]\n{entry} = apt_{name}:Mine\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the eight packages installed."""
    folder = tmp_path_factory.mktemp("hostile")
    wheels = [str(wheel(folder, name)) for name in PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*pip, "--target", str(folder / "site"), *wheels], capture_output=True, text=True, check=False
    )
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed here")
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(folder / "site")}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)


def test_the_doctor_names_each_of_them(environment: dict[str, str]) -> None:
    done = run(environment, "-m", "apt", "doctor", "--time-limit", "8")
    assert done.returncode == 1
    for subject, what in TOLD.items():
        assert any(line.startswith(subject) and what in line for line in done.stdout.splitlines()), (
            subject,
            done.stdout,
        )


def test_no_profile_that_does_not_use_them_notices_them(environment: dict[str, str]) -> None:
    code = """
import sys
from pathlib import Path
from apt.core import load_profile
from apt.errors import ProfileError
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        print(path.name, len(load_profile(path).resolved.resolutions))
    except ProfileError as error:
        print(path.name, error)
bad = sorted({name for name in sys.modules if name.startswith("apt_")} & set(sys.argv[2:]) | {"torch"} & set(sys.modules))
print("imported:", *bad)
"""
    done = run(environment, "-c", code, str(ROOT / "profiles"), *(f"apt_{name}" for name in PACKAGES))
    *profiles, imported = done.stdout.splitlines()
    assert (done.returncode, imported) == (0, "imported:"), done.stderr
    for line in profiles:
        name, _, rest = line.partition(" ")
        uses_sdpa = "sdpa" in (ROOT / "profiles" / name).read_text()
        assert "attention.sdpa is claimed by apt-core" in rest if uses_sdpa else rest.isdigit(), line
