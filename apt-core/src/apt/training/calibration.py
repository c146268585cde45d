"""`hardware.matmul: auto`: which route float32 products take on this machine, and which way attention takes with it.

PyTorch multiplies float32 matrices through the BLAS that it was built with, which is slow on some processors. oneDNN may be
faster there, and PyTorch takes it only with leave to round to bfloat16 (`torch.backends.mkldnn.matmul.fp32_precision`); where
a processor has no units for that, oneDNN does not round. So nothing is assumed: both routes multiply matrices of the model's own
shapes, and a route whose error against float64 exceeds `LARGEST_ERROR` is refused however fast it is. Which way of attention is
the fastest depends on the route, so the two are chosen together.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from apt.core.config import APTConfig
from apt.layers.ways import Shape, Way, choose_ways, possible_ways
from apt.modeling.model import Decoder
from apt.training.checkpoint import read_saved
from apt.training.measuring import Bench, Figure, Route, find_shapes, on_route, task_of_attention, task_of_product
from apt.training.ranks import Ranks

LARGEST_ERROR = 1e-6
"""The relative error, in the Frobenius norm against float64, above which a route or a way of float32 is refused."""
WORTH = 0.97
"""What is not the default is taken where it needs at most this share of the default's time."""


@dataclass(frozen=True)
class Machine:
    """What a choice holds for."""

    processor: str
    threads: int
    torch: str

    @classmethod
    def now(cls) -> Machine:
        """This process."""
        return cls(_processor(), torch.get_num_threads(), torch.__version__)


@dataclass(frozen=True)
class Calibration:
    """What was chosen, for what, and why; `lines` say it."""

    machine: Machine
    precision: str
    route: Route
    ways: Mapping[Shape, Way]
    figures: tuple[Figure, ...]
    lines: tuple[str, ...]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Work by this choice, in the whole process."""
        with choose_ways(self.ways), on_route(self.route):
            yield

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        ways = [{**shape.to_dict(), "way": way} for shape, way in self.ways.items()]
        return {
            "machine": asdict(self.machine),
            "precision": self.precision,
            "route": self.route,
            "ways": ways,
            "figures": [asdict(each) for each in self.figures],
            "lines": list(self.lines),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        return cls(
            Machine(**saved["machine"]),
            saved["precision"],
            saved["route"],
            {Shape.from_dict(each): each["way"] for each in saved["ways"]},
            tuple(Figure(**each) for each in saved["figures"]),
            tuple(saved["lines"]),
        )


def calibrate(model: Decoder, tokens: Tensor, config: APTConfig) -> Calibration:
    """Measure this machine at the shapes that `model` has for `tokens` [batch, seq]; no state of either is changed.

    In bf16 products are bfloat16's own, which have one route, and on a GPU they are not chosen either: then the way of
    attention is chosen alone.
    """
    bf16 = config.training.precision == "bf16"
    products, shapes = find_shapes(model, tokens, bf16=bf16)
    bench = Bench(tokens.device)
    routes: list[Route] = ["default"]
    if not bf16 and tokens.device.type == "cpu":
        routes.append("onednn")
    for product, count in products.items():
        for route in routes:
            bench.add(task_of_product(product, count, route, torch.bfloat16 if bf16 else torch.float32, tokens.device))
        if bf16:
            bench.add(task_of_product(product, count, "default", torch.float32, tokens.device))
    for shape, (count, batch) in shapes.items():
        for route in routes:
            for way in possible_ways(shape):
                bench.add(task_of_attention(shape, count, batch, route, way, config.attention_dropout))
    figures = bench.measure()
    ways = {route: {shape: _best_way(shape, route, figures) for shape in shapes} for route in routes}
    totals = {route: _total(figures, route, ways[route], "bfloat16" if bf16 else "float32") for route in routes}
    errors = {route: _largest_error(figures, route, ways[route]) for route in routes}
    route = _best_route(totals, errors)
    lines = [_say_route(route, totals, errors), *(_say_path(each, route, ways[route], figures) for each in shapes)]
    if bf16:
        lines += _compare_precisions(figures)
    return Calibration(Machine.now(), config.training.precision, route, ways[route], figures, tuple(lines))


def settle(
    model: Decoder,
    read: Callable[[], Tensor],
    config: APTConfig,
    kept: Mapping[str, Any] | None,
    ranks: Ranks,
    console: Console,
) -> Calibration:
    """How a run computes: as the checkpoint that it goes on from has `kept` it, else measured now on the tokens [batch, seq] that
    `read` gives, the same on all ranks.

    Under `strict` nothing is measured. What was chosen is printed.
    """
    precision, here = config.training.precision, Machine.now()
    strict = Calibration(here, precision, "default", {}, (), ())
    if config.hardware.matmul == "strict":
        return strict
    before = None if kept is None else Calibration.from_dict(kept)
    if before is not None and before.figures and (before.machine, before.precision) == (here, precision):
        chosen = before
    else:
        if before is not None:
            _say(console, "the run goes on under other conditions and is measured anew: its last bits may be others")
        with console.status("measuring how this machine multiplies best"):
            measured = calibrate(model, read(), config).to_dict()
        chosen, *others = (Calibration.from_dict(each) for each in ranks.gather(measured) if isinstance(each, dict))
        if any(each.machine.processor != chosen.machine.processor for each in others):
            chosen = replace(strict, lines=("the ranks have different processors: PyTorch's defaults are taken",))
    for line in chosen.lines:
        _say(console, line)
    return chosen


def calibration_of(checkpoint: Path) -> Calibration:
    """What a checkpoint's run chose, for computing as it did; PyTorch's defaults where this machine is another."""
    kept = read_saved(checkpoint)["progress"].get("calibration")
    here = Machine.now()
    if kept is not None:
        chosen = Calibration.from_dict(kept)
        if (chosen.machine.processor, chosen.machine.torch) == (here.processor, here.torch):
            return chosen
    return Calibration(here, "fp32", "default", {}, (), ())


def _say(console: Console, line: str) -> None:
    console.print(f"matmul: {line}", highlight=False, markup=False, soft_wrap=True)


# Choosing


def _best_way(shape: Shape, route: Route, figures: Sequence[Figure]) -> Way:
    """The fastest that is exact enough; PyTorch's kernel where nothing is clearly faster."""
    usual: Way = "sdpa"
    found = {way: _figure(figures, str(shape), route, way) for way in possible_ways(shape)}
    exact = [way for way, figure in found.items() if (figure.error or 0.0) <= LARGEST_ERROR]
    best = min(exact or [usual], key=lambda way: found[way].milliseconds)
    return best if found[best].milliseconds <= WORTH * found[usual].milliseconds else usual


def _best_route(totals: Mapping[Route, float], errors: Mapping[Route, float]) -> Route:
    exact = "onednn" in totals and errors["onednn"] <= LARGEST_ERROR
    return "onednn" if exact and totals["onednn"] <= WORTH * totals["default"] else "default"


def _figure(figures: Sequence[Figure], what: str, route: str, way: str) -> Figure:
    return next(each for each in figures if (each.what, each.route, each.way) == (what, route, way))


def _taken(figures: Sequence[Figure], route: Route, ways: Mapping[Shape, Way], precision: str) -> list[Figure]:
    """What a micro-batch does by this route."""
    mixed = {(str(shape), way) for shape, way in ways.items()}
    return [
        each for each in figures if each.route == route and (each.way == precision or (each.what, each.way) in mixed)
    ]


def _total(figures: Sequence[Figure], route: Route, ways: Mapping[Shape, Way], precision: str) -> float:
    """Milliseconds of products and attention in a micro-batch."""
    return sum(each.count * each.milliseconds for each in _taken(figures, route, ways, precision))


def _largest_error(figures: Sequence[Figure], route: Route, ways: Mapping[Shape, Way]) -> float:
    return max((each.error or 0.0 for each in _taken(figures, route, ways, "float32")), default=0.0)


def _say_route(route: Route, totals: Mapping[Route, float], errors: Mapping[Route, float]) -> str:
    if "onednn" not in totals:
        return f"products by PyTorch's default ({totals['default']:.1f} ms a micro-batch, with attention)"
    told = (
        f"{totals['default']:.1f} ms a micro-batch by PyTorch's default, {totals['onednn']:.1f} ms by oneDNN; relative errors "
        f"{errors['default']:.1e} and {errors['onednn']:.1e}"
    )
    if route == "onednn":
        return f"products by oneDNN ({told})"
    why = "oneDNN is refused" if errors["onednn"] > LARGEST_ERROR else "oneDNN would gain nothing"
    return f"products by PyTorch's default, {why} ({told})"


def _say_path(shape: Shape, route: Route, ways: Mapping[Shape, Way], figures: Sequence[Figure]) -> str:
    times = (f"{way} {_figure(figures, str(shape), route, way).milliseconds:.2f} ms" for way in possible_ways(shape))
    return f"{shape}: {ways[shape]} ({', '.join(times)})"


def _compare_precisions(figures: Sequence[Figure]) -> list[str]:
    """A line where bfloat16 makes this machine slower."""
    times = {name: sum(each.count * each.milliseconds for each in figures if each.way == name) for name in _NAMES}
    slower = times["bfloat16"] / max(1e-9, times["float32"])
    if slower < 1:
        return []
    return [
        f"bfloat16 products take {slower:.1f} times as long as float32's on this processor; "
        "training.precision: fp32 would be faster"
    ]


_NAMES = ("bfloat16", "float32")


def _processor() -> str:
    """The processor's name, and the vector units that PyTorch sees in it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
