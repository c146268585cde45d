"""All checks: ``nox`` runs them, ``nox -s lint`` one of them.

The wheels are built once; each distribution is tested alone, from its wheel, in an environment that holds nothing but
what it declares and the test tools.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "imports", "types", "tests", "authors", "docs"]

DISTRIBUTIONS = ("apt-core", "apt-attention-tva", "apt-moe", "apt-align", "apt-rag")
SOURCES = [f"{name}/src" for name in DISTRIBUTIONS]
TEST_TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema", "beartype")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
CALM = "--hypothesis-profile=ci"
"""Hypothesis without deadlines, and the same examples every time: a busy machine is no fault of the code."""
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
    chosen = [wheels[name] + ("[bpe,chat,gguf]" if name == "apt-core" else "") for name in names]
    session.install("--quiet", "--constraint", "constraints.txt", *chosen, *tools)


@nox.session
@nox.parametrize("packages", [*DISTRIBUTIONS, "together"])
def tests(session: nox.Session, packages: str) -> None:
    """One distribution from its wheel, with apt-core where it needs it and nothing else of ours; then all of them."""
    if packages == "together":
        install(session, DISTRIBUTIONS, *TEST_TOOLS)
        folders = ["tests"]
    else:
        install(session, tuple(dict.fromkeys(("apt-core", packages))), *TEST_TOOLS)
        folders = [f"{packages}/tests"]
    session.run("pytest", "-q", "-n", "2", CALM, *folders, *session.posargs, env=ENVIRONMENT)


@nox.session
def thorough(session: nox.Session) -> None:
    """Further cases of what the tests of everything together cover, which would make the ordinary command long."""
    install(session, DISTRIBUTIONS, *TEST_TOOLS)
    session.run("pytest", "-q", "-n", "2", CALM, "-m", "thorough", "tests", *session.posargs, env=ENVIRONMENT)


@nox.session
def authors(session: nox.Session) -> None:
    """The packages of others: the one to copy, as its README says, with apt-core alone; the example beside all of ours."""
    install(session, ("apt-core",), *TEST_TOOLS, "./template")
    session.run("pytest", "-q", CALM, "template/tests", env=ENVIRONMENT)
    install(session, DISTRIBUTIONS, *TEST_TOOLS, "./examples/apt-voter")
    session.run("pytest", "-q", CALM, "examples/apt-voter/tests", env=ENVIRONMENT)


@nox.session
def docs(session: nox.Session) -> None:
    """Every block of code in the README and the docs runs."""
    install(session, DISTRIBUTIONS, *TEST_TOOLS, "sybil>=9")
    pages = ["docs", "README.md", *(f"{name}/README.md" for name in DISTRIBUTIONS)]
    session.run("pytest", "-q", "-p", "blocks", *pages, env={**ENVIRONMENT, "PYTHONPATH": "docs"})


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the five packages."""
    install(session, DISTRIBUTIONS, "mypy>=1.18", "pytest>=8", "types-PyYAML", "types-psutil")
    session.run("mypy", *SOURCES)


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom; and that everything which only looks at profiles works where PyTorch is not installed."""
    wheels = build(session)
    session.install("--quiet", "--no-deps", *(wheels[name] for name in DISTRIBUTIONS))
    session.install("--quiet", *without_torch("apt-core"), "import-linter>=2.5")
    session.run("lint-imports")
    session.run("apt-core", "--help", silent=True)
    session.run("apt-core", "providers")
    session.run("apt-core", "doctor")
    session.run("apt-core", "schema", silent=True)
    for profile in sorted(Path("profiles").glob("*.yaml")):
        session.run("apt-core", "check", str(profile), silent=True)


def without_torch(name: str) -> list[str]:
    """What a distribution requires, but for PyTorch."""
    requires: list[str] = tomllib.loads(Path(name, "pyproject.toml").read_text())["project"]["dependencies"]
    return [requirement for requirement in requires if not requirement.startswith("torch")]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely faults."""
    session.install("--quiet", "ruff>=0.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
