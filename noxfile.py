"""All checks: ``nox`` runs them, ``nox -s lint`` one of them.

The wheels are built once; each distribution is tested alone, from its wheel, in an environment that holds nothing but
what it declares and the test tools.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]

DISTRIBUTIONS = ("apt-core", "apt-attention-tva", "apt-moe", "apt-align", "apt-rag")
SOURCES = [f"{name}/src" for name in DISTRIBUTIONS]
PYTHON_CODE = [*SOURCES, *(f"{name}/tests" for name in DISTRIBUTIONS), "noxfile.py", "tests"]
TEST_TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema", "beartype")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
WHEELS = Path("dist")


def build(session: nox.Session) -> dict[str, str]:
    """The wheels, built by the first session that needs them; ``nox`` in a clean tree always builds."""
    built = getattr(build, "wheels", None)
    if built is None:
        for old in WHEELS.glob("*.whl"):
            old.unlink()
        folders = [f"./{name}" for name in DISTRIBUTIONS]
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(WHEELS), *folders)
        built = {name: str(next(WHEELS.glob(f"{name.replace('-', '_')}-*.whl"))) for name in DISTRIBUTIONS}
        build.wheels = built  # type: ignore[attr-defined]
    return built


def install(session: nox.Session, names: tuple[str, ...], *tools: str) -> None:
    wheels = build(session)
    chosen = [wheels[name] + ("[bpe]" if name == "apt-core" else "") for name in names]
    session.install("--quiet", "--constraint", "constraints.txt", *chosen, *tools)


@nox.session
@nox.parametrize("distribution", DISTRIBUTIONS)
def tests(session: nox.Session, distribution: str) -> None:
    """One distribution from its wheel, with apt-core where it needs it and nothing else of ours."""
    names = ("apt-core",) if distribution == "apt-core" else ("apt-core", distribution)
    install(session, names, *TEST_TOOLS)
    session.run("pytest", "-q", "-n", "2", f"{distribution}/tests", *session.posargs, env=ENVIRONMENT)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely faults."""
    session.install("--quiet", "ruff>=0.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
