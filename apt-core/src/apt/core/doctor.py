"""What is installed, and what is wrong with it, by name. Data, not printing.

Everything that can be told from metadata is; then each provider is loaded in a process of its own distribution, with a
time limit, so that an import that raises, hangs, ends the interpreter or drags PyTorch in is told apart from all the
others and does no harm here.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from apt.core.catalogue import COMMAND, describe_collision
from apt.core.discovery import ProviderRecord, discover
from apt.core.hooks import HookRunner
from apt.core.provider import Provider
from apt.core.providers import Plugin
from apt.core.registry import Registry
from apt.core.requirements import InvalidRequirement, check_record
from apt.errors import AptError, OptionsError, RequirementError, UserError

Level = Literal["ok", "warning", "fault"]
START_SECONDS = 60.0
"""How long an interpreter may take to start and import apt itself."""
SLOW_SECONDS = 1.0
"""An import that takes longer is remarked on."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: a provider (`kind.name`), an entry point, or an environment variable."""

    subject: str
    distribution: str
    level: Level
    what: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found, in order of subject; `environment` says where."""

    environment: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is at fault."""
        return all(finding.level != "fault" for finding in self.findings)


def diagnose(*, time_limit: float = 20.0) -> Diagnosis:
    """Look at everything that is installed; each provider's import may take `time_limit` seconds."""
    findings: list[Finding] = []
    registry = Registry(discover)
    try:
        records = registry.records()
    except UserError as error:
        findings += [Finding("environment", "", "fault", line) for line in str(error).splitlines()]
        registry = Registry()
        records = list(discover().records)
    findings += [Finding(fault.where, "", "fault", fault.what) for fault in registry.faults()]
    claims: dict[str, list[ProviderRecord]] = {}
    for record in records:
        claims.setdefault(record.key, []).append(record)
    to_load: dict[str, list[ProviderRecord]] = {}
    for key, all_claims in claims.items():
        able = [claim for claim in all_claims if not claim.disabled]
        findings += [
            Finding(key, claim.origin, "warning", f"disabled: {claim.disabled}")
            for claim in all_claims
            if claim.disabled
        ]
        if len(able) > 1:
            findings += [Finding(key, claim.origin, "fault", describe_collision(able)) for claim in able]
        elif able:
            to_load.setdefault(able[0].distribution, []).append(able[0])
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for loaded in pool.map(lambda group: list(_load_all(group, time_limit)), to_load.values()):
            findings += loaded
    findings.sort(key=lambda finding: (finding.subject, finding.distribution))
    return Diagnosis(_environment(), tuple(findings))


def _environment() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": f"{platform.python_version()} ({platform.system()} {platform.machine()})"}
    for name in ("apt-core", "torch", "pydantic", "pluggy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _load_all(records: Sequence[ProviderRecord], time_limit: float) -> Iterator[Finding]:
    """Load the providers of one distribution; a process that has to be ended costs one provider, and the rest go on."""
    left = list(records)
    while left:
        for record, finding in _load_some(tuple(left), time_limit):
            left.remove(record)
            yield finding


def _load_some(records: Sequence[ProviderRecord], time_limit: float) -> Iterator[tuple[ProviderRecord, Finding]]:
    """Load providers in one process until it is of no further use: all done, hanging, dead, or PyTorch came in."""
    task = json.dumps({"path": sys.path, "names": [[record.kind, record.name] for record in records]})
    start = "import json, sys; task = json.loads(sys.stdin.readline()); sys.path[:] = task['path']; "
    child = subprocess.Popen(
        [sys.executable, "-c", start + "from apt.core.doctor import probe; probe(task['names'])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child, task, lines), daemon=True)
    reader.start()
    try:
        line = _next(lines, START_SECONDS)
        for record in records:
            line = _next(lines, time_limit) if line else line
            if line:
                told = json.loads(line)
                yield record, Finding(record.key, record.origin, told["level"], told["what"])
                if told["last"]:
                    return
                continue
            if line is None:
                what = f"importing {record.entry_point} takes longer than {time_limit:g} s"
            else:
                what = f"the interpreter ended (exit code {child.wait()}) while importing {record.entry_point}"
            yield record, Finding(record.key, record.origin, "fault", what)
            return
    finally:
        child.kill()
        child.wait()
        reader.join()


def _read(child: subprocess.Popen[str], task: str, lines: queue.Queue[str]) -> None:
    """Give the child its task and pass on what it says; ``""`` when it has ended."""
    if child.stdin is not None and child.stdout is not None:
        with suppress(BrokenPipeError), child.stdin:  # a child that ended at once is told by its silence
            child.stdin.write(task + "\n")
        with child.stdout:
            for line in child.stdout:
                lines.put(line)
    lines.put("")


def _next(lines: queue.Queue[str], seconds: float) -> str | None:
    """The child's next line, ``""`` where it has ended, None where it is not there in time."""
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return None


def probe(names: Sequence[tuple[str, str]]) -> None:
    """The child's part: load each provider and say how it went, one line of JSON each."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what packages print is not a report
    registry = Registry(discover)
    report.write("ready\n")
    report.flush()
    for kind, name in names:
        started = time.perf_counter()
        level, what = _examine(registry, kind, name)
        seconds, torch = time.perf_counter() - started, "torch" in sys.modules
        if level == "ok" and torch and kind != COMMAND:
            level, what = "warning", "imports torch when it is described; import it in the method that makes the part"
        elif level == "ok" and seconds > SLOW_SECONDS:
            level, what = "warning", f"takes {seconds:.1f} s to import"
        report.write(json.dumps({"level": level, "what": what, "last": torch}) + "\n")
        report.flush()
        if torch:
            return


def _examine(registry: Registry, kind: str, name: str) -> tuple[Level, str]:
    try:
        if kind == COMMAND:
            found = registry.load_object(kind, name)
            return ("ok", "") if callable(found) else ("fault", f"{found!r} cannot be called")
        registry.load(kind, name)
        provider = registry.get(kind, name, fallback=False)
        _check_hooks(name, provider)
    except OptionsError as error:
        try:
            _check_hooks(name, registry.load(kind, name).model_construct())
        except AptError as found:
            return "fault", str(found)
        wanting = [fault for fault in error.faults if fault.what != "must be given"]
        return (
            ("warning", "; ".join(f"its defaults are refused: {fault}" for fault in wanting)) if wanting else ("ok", "")
        )
    except RequirementError as error:
        return ("fault" if _lacks_own_requirement(registry, kind, name) else "warning"), str(error)
    except AptError as error:
        return "fault", str(error)
    except Exception as error:  # noqa: BLE001  a package can raise anything, and its name is to be told
        return "fault", f"{type(error).__name__}: {error}"
    return "ok", ""


def _lacks_own_requirement(registry: Registry, kind: str, name: str) -> bool:
    """Whether its distribution was installed without what it requires; extras and further dependencies are optional."""
    record = next(record for record in registry.records(kind) if record.name == name and not record.disabled)
    try:
        return bool(check_record(replace(record, extras=())))
    except InvalidRequirement:
        return True


def _check_hooks(name: str, provider: Provider) -> None:
    if isinstance(provider, Plugin):
        HookRunner({name: provider})
