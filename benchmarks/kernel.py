"""What the kernel costs: discovery, look-ups, memory, loading a profile, hooks. Each number beside its goal.

``python benchmarks/kernel.py`` prints a table and exits with 1 where a goal is missed. Medians throughout; what is
compared is measured in turns, so that a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Idle
from torch.nn.functional import cross_entropy

from apt.core.discovery import discover
from apt.core.hooks import HookRunner
from apt.core.profile import load_profile
from apt.core.registry import Registry
from apt.hookspecs import Batch, RunState
from apt.modeling.compose import ModelBuilder

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = 500


@dataclass(frozen=True)
class Line:
    """One number and its goal."""

    what: str
    measured: float
    goal: float
    unit: str


def main() -> int:
    """Measure everything."""
    lines = [*measure_registry(), measure_profile(), *measure_hooks()]
    for line in lines:
        mark = "good" if line.measured < line.goal else "MISSED"
        print(f"{line.what:<72} {line.measured:9.3f} {line.unit:<3} goal < {line.goal:g} {line.unit:<3} {mark}")
    return int(any(line.measured >= line.goal for line in lines))


def measure_registry() -> Iterator[Line]:
    """Discovery, look-ups and memory beside 500 further distributions, one in five of them with providers."""
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), every=5)
        without, beside = alternate(lambda: discover(sys.path), lambda: discover([*sys.path, folder]), 30)
        yield Line(f"discovery over {DISTRIBUTIONS} distributions adds", 1e3 * (beside - without), 50, "ms")
        registry = Registry(lambda: discover([*sys.path, folder]))
        provider = registry.get("attention", "sdpa", fallback=False)
        table = {("attention", "sdpa"): provider}
        repeat = 20_000
        by_dict, by_registry = alternate(
            lambda: [table.get(("attention", "sdpa")) for _ in range(repeat)],
            lambda: [registry.get("attention", "sdpa") for _ in range(repeat)],
            20,
        )
        yield Line("a look-up takes longer than a dict's by", 1e6 * (by_registry - by_dict) / repeat, 1, "us")
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), every=1)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        registry = Registry(lambda: discover([folder]))
        count = len(registry.records())
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        yield Line(f"memory of a registry with {count} distributions, each with a provider", used / 2**20, 5, "MB")


def measure_profile() -> Line:
    """Loading, validating and resolving the large profile, imports done."""
    path = ROOT / "profiles" / "gpt5_moe_reasoning.yaml"
    with quiet():
        load_profile(path)
        seconds = statistics.median(timed(lambda: load_profile(path)) for _ in range(20))
    return Line(f"loading and validating {path.name}", 1e3 * seconds, 20, "ms")


def measure_hooks() -> Iterator[Line]:
    """Training steps with ten plugins whose hooks do nothing, and with none; then the hooks' calls alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    profile = load_profile(ROOT / "profiles" / "core.yaml")
    model = ModelBuilder(profile.config).build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(3, 200, (profile.config.training.batch_size, profile.config.max_seq_len + 1))
    none, ten = HookRunner({}), HookRunner({f"idle{number}": Idle() for number in range(10)})

    def step(runner: HookRunner) -> None:
        state = RunState(step=1, epoch=0, max_steps=10, max_epochs=1)
        runner.hook.apt_step_start(state=state)
        batch = Batch(tokens[:, :-1], tokens[:, 1:])
        runner.hook.apt_batch_prepare(state=state, batch=batch)
        output = model(batch.tokens)
        loss = cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
        runner.hook.apt_loss_extra(state=state, model=model, batch=batch, output=output)
        loss.backward()
        runner.hook.apt_gradients_ready(state=state, model=model)
        optimizer.step()
        optimizer.zero_grad()
        runner.hook.apt_step_end(state=state, model=model, metrics={})

    def calls(runner: HookRunner) -> None:
        state = RunState(step=1, epoch=0, max_steps=10, max_epochs=1)
        batch = Batch(tokens, tokens)
        runner.hook.apt_step_start(state=state)
        runner.hook.apt_batch_prepare(state=state, batch=batch)
        runner.hook.apt_loss_extra(state=state, model=model, batch=batch, output=None)
        runner.hook.apt_gradients_ready(state=state, model=model)
        runner.hook.apt_step_end(state=state, model=model, metrics={})

    step(none)
    plain, with_hooks = alternate(lambda: step(none), lambda: step(ten), 15)
    idle_0, idle_10 = alternate(lambda: calls(none), lambda: calls(ten), 200)
    yield Line(
        "the calls of ten idle plugins' hooks, share of a training step", 100 * (idle_10 - idle_0) / plain, 1, "%"
    )
    print(f"(a step: {1e3 * plain:.1f} ms without, {1e3 * with_hooks:.1f} ms with ten idle plugins)")


def install(folder: Path, every: int) -> None:
    """Write the metadata of 500 distributions, every n-th with a provider."""
    for number in range(DISTRIBUTIONS):
        info = folder / f"synthetic_{number}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: synthetic-{number}\nVersion: 1.0\nRequires-Dist: numpy\n\n"
        (info / "METADATA").write_text(head + "A description. " * 500)
        provider = f"[apt.providers]\nattention.synthetic_{number} = synthetic_{number}.provider:Attention\n"
        scripts = f"[console_scripts]\nsynthetic-{number} = synthetic_{number}:main\n\n"
        (info / "entry_points.txt").write_text(scripts + (provider if number % every == 0 else ""))


def alternate(one: Callable[[], object], other: Callable[[], object], times: int) -> tuple[float, float]:
    """The median seconds of each, measured in turns."""
    pairs = [(timed(one), timed(other)) for _ in range(times)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def quiet() -> Iterator[None]:
    """Without the deprecation lines of old keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
