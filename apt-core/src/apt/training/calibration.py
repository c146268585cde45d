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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apt.core.config import APTConfig
from apt.layers.ways import Shape, Way, choose_ways, mix_by, possible_ways, watch_shapes
from apt.modeling.model import Decoder
from apt.training.checkpoint import read_saved
from apt.training.ranks import Ranks

Route = Literal["default", "onednn"]
LARGEST_ERROR = 1e-6
"""The relative error, in the Frobenius norm against float64, above which a route or a way of float32 is refused."""
WORTH = 0.97
"""What is not the default is taken where it needs at most this share of the default's time."""
SECONDS, LEAST, MOST = 3.0, 3, 25
"""About how long the measuring takes, and how often each thing is measured at least and at most."""
LARGEST_WORK = 8e9
"""Operations of one forward and backward pass that is measured; larger ones are measured on a part of the batch."""

Product = tuple[int, int, int]
"""Rows, columns in, columns out of a linear map."""


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
class Figure:
    """One thing that was measured: milliseconds of a forward and backward pass, how often a micro-batch does it, and the
    relative error, None where it is not float32."""

    what: str
    route: str
    way: str
    milliseconds: float
    count: int
    error: float | None


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
        with choose_ways(self.ways), _on(self.route):
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
    products, shapes = _find_shapes(model, tokens, bf16=bf16)
    bench = _Bench(tokens.device)
    routes: list[Route] = ["default"]
    if not bf16 and tokens.device.type == "cpu":
        routes.append("onednn")
    for product, count in products.items():
        for route in routes:
            bench.add(_of_product(product, count, route, torch.bfloat16 if bf16 else torch.float32, tokens.device))
        if bf16:
            bench.add(_of_product(product, count, "default", torch.float32, tokens.device))
    for shape, (count, batch) in shapes.items():
        for route in routes:
            for way in possible_ways(shape):
                bench.add(_of_attention(shape, count, batch, route, way, config.attention_dropout))
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
    model: Decoder, tokens: Tensor, config: APTConfig, kept: Mapping[str, Any] | None, ranks: Ranks, console: Console
) -> Calibration:
    """How a run computes: as the checkpoint that it goes on from has `kept` it, else measured now, the same on all ranks.

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
            measured = calibrate(model, tokens, config).to_dict()
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


# What a model does


def _find_shapes(
    model: Decoder, tokens: Tensor, *, bf16: bool
) -> tuple[dict[Product, int], dict[Shape, tuple[int, int]]]:
    """The products and the shapes of attention of one forward pass: how often each comes, and attention's largest batch."""
    was_training = model.training
    try:
        with (
            torch.no_grad(),
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16),
            _Products() as products,
            watch_shapes() as shapes,
        ):
            model.eval()(tokens)
    finally:
        model.train(was_training)
    return products.seen, shapes


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products of two matrices by their sizes, whatever calls them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[Product, int] = {}

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note it, and let it run."""
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            key = (left.shape[0], left.shape[1], right.shape[1])
            self.seen[key] = self.seen.get(key, 0) + 1
        assert callable(func)
        return func(*args, **({} if kwargs is None else kwargs))


# Measuring


@dataclass(frozen=True)
class _Task:
    """`run` is timed, a part `share` of the whole; `check` computes the same without dropout, in a dtype that is given."""

    what: str
    route: Route
    way: str
    count: int
    share: float
    run: Callable[[], object]
    check: Callable[[torch.dtype], Sequence[Tensor]] | None


def _of_product(product: Product, count: int, route: Route, dtype: torch.dtype, device: torch.device) -> _Task:
    """x W^T, and the two products of its backward pass."""
    rows, inward, outward = product
    part = min(rows, max(64, int(LARGEST_WORK / (6 * inward * outward))))
    x, weight, gradient = (
        _draw(index, size, dtype, device)
        for index, size in enumerate(((part, inward), (outward, inward), (part, outward)))
    )

    def check(dtype: torch.dtype) -> Sequence[Tensor]:
        a, b, c = x.to(dtype), weight.to(dtype), gradient.to(dtype)
        return a @ b.T, c @ b, c.T @ a

    what = f"product of {rows} x {inward} and {inward} x {outward}"
    exact = check if dtype == torch.float32 else None
    name = str(dtype).removeprefix("torch.")
    return _Task(what, route, name, count, part / rows, lambda: check(dtype), exact)


def _of_attention(shape: Shape, count: int, batch: int, route: Route, way: Way, dropout: float) -> _Task:
    """Attention, forward and backward."""
    each = 7 * shape.heads * shape.queries * shape.keys * (shape.width + shape.v_width)
    part = min(batch, max(1, int(LARGEST_WORK / each)))
    # Laid out as projections leave them, not head by head.
    sizes = (
        (part, shape.queries, shape.heads, shape.width),
        (part, shape.keys, shape.kv_heads, shape.width),
        (part, shape.keys, shape.kv_heads, shape.v_width),
        (part, shape.queries, shape.heads, shape.v_width),
    )
    device = torch.device(shape.device)
    q, k, v, gradient = (_draw(index, size, shape.dtype, device).transpose(1, 2) for index, size in enumerate(sizes))
    visible = None
    if shape.masked:
        visible = torch.ones(shape.queries, shape.keys, dtype=torch.bool, device=device).tril()

    def mixed(dtype: torch.dtype, dropout: float) -> Sequence[Tensor]:
        a, b, c = (each.to(dtype).detach().requires_grad_() for each in (q, k, v))
        y = mix_by(way, a, b, c, causal=shape.causal, visible=visible, scale=None, dropout=dropout)
        return y, *torch.autograd.grad(y, (a, b, c), gradient.to(dtype))

    exact = (lambda dtype: mixed(dtype, 0.0)) if shape.dtype == torch.float32 else None
    return _Task(str(shape), route, way, count, part / batch, lambda: mixed(shape.dtype, dropout), exact)


class _Bench:
    """Measures tasks by turns, so that what disturbs the machine disturbs all of them alike."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tasks: list[tuple[_Task, float | None, list[float]]] = []
        self._exact: dict[str, Sequence[Tensor]] = {}

    def add(self, task: _Task) -> None:
        """One more; its error is taken now."""
        error = None
        if task.check is not None:
            if task.what not in self._exact:
                self._exact = {task.what: task.check(torch.float64)}
            with _on(task.route):
                error = _error(task.check(torch.float32), self._exact[task.what])
        self._tasks.append((task, error, []))

    def measure(self) -> tuple[Figure, ...]:
        """The least of as many rounds as there is time for: what else runs on the machine only adds to it."""
        self._exact = {}
        end = time.perf_counter() + SECONDS
        with torch.random.fork_rng():
            for number in range(MOST):
                if number >= LEAST and time.perf_counter() > end:
                    break
                for task, _, times in self._tasks:
                    with _on(task.route):
                        times.append(self._time(task))
        return tuple(
            Figure(each.what, each.route, each.way, round(1000 * min(times), 4), each.count, error)
            for each, error, times in self._tasks
        )

    def _time(self, task: _Task) -> float:
        start = time.perf_counter()
        task.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / task.share


def _error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error."""
    return max(
        ((each.double() - right).norm() / right.norm().clamp_min(1e-300)).item()
        for each, right in zip(results, exact, strict=True)
    )


def _draw(seed: int, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers that leave the process's random state alone."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


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


@contextlib.contextmanager
def _on(route: Route) -> Iterator[None]:
    """float32 products by this route."""
    if route == "default":
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _processor() -> str:
    """The processor's name, and the vector units that PyTorch sees in it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
