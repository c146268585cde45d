"""What a model multiplies and attends to, and how long each of these takes by each route: the measuring behind `calibration`.

Tasks are measured by turns, so that what else the machine does disturbs all of them alike; float32 ones are held against float64.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apt.layers.sharded import let_go
from apt.layers.ways import Shape, Way, mix_by, watch_shapes
from apt.modeling.model import Decoder
from apt.training.randoms import random_devices

Route = Literal["default", "onednn"]
SECONDS, LEAST, MOST = 3.0, 3, 25
"""About how long the measuring takes, and how often each thing is measured at least and at most."""
LARGEST_WORK = {"cpu": 8e9, "cuda": 8e11}
"""Operations of one forward and backward pass that is measured; larger ones are measured on a part of the batch."""

Product = tuple[int, int, int]
"""Rows, columns in, columns out of a linear map."""


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


@contextlib.contextmanager
def on_route(route: Route) -> Iterator[None]:
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


def find_shapes(
    model: Decoder, tokens: Tensor, *, bf16: bool
) -> tuple[dict[Product, int], dict[Shape, tuple[int, int]]]:
    """The products and the shapes of attention of one forward pass: how often each comes, and attention's largest batch."""
    was_training = model.training
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # what is compiled shows no products
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16),
            _Products() as products,
            watch_shapes() as shapes,
        ):
            model.eval()(tokens)
    finally:
        model.train(was_training)
        let_go(model)
    return products.seen, shapes


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products of two matrices by their sizes, whatever calls them."""

    supports_higher_order_operators = True
    """Such as flex_attention, which is let through like all else."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """That it only looks on: PyTorch compiles nothing, flex_attention neither, within what may change operators."""
        return True

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


@dataclass(frozen=True)
class Task:
    """`run` is timed, a part `share` of the whole; `check` computes the same without dropout, in a dtype that is given."""

    what: str
    route: Route
    way: str
    count: int
    share: float
    run: Callable[[], object]
    check: Callable[[torch.dtype], Sequence[Tensor]] | None


def task_of_product(product: Product, count: int, route: Route, dtype: torch.dtype, device: torch.device) -> Task:
    """x W^T, and the two products of its backward pass."""
    rows, inward, outward = product
    part = min(rows, max(64, int(LARGEST_WORK[device.type] / (6 * inward * outward))))
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
    return Task(what, route, name, count, part / rows, lambda: check(dtype), exact)


def task_of_attention(shape: Shape, count: int, batch: int, route: Route, way: Way, dropout: float) -> Task:
    """Attention, forward and backward."""
    each = 7 * shape.heads * shape.queries * shape.keys * (shape.width + shape.v_width)
    part = min(batch, max(1, int(LARGEST_WORK[shape.device] / each)))
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
    return Task(str(shape), route, way, count, part / batch, lambda: mixed(shape.dtype, dropout), exact)


class Bench:
    """Measures tasks by turns, so that what disturbs the machine disturbs all of them alike."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tasks: list[tuple[Task, float | None, list[float]]] = []
        self._exact: dict[str, Sequence[Tensor]] = {}

    def add(self, task: Task) -> None:
        """One more; its error is taken now."""
        error = None
        if task.check is not None:
            if task.what not in self._exact:
                self._exact = {task.what: task.check(torch.float64)}
            with on_route(task.route):
                error = _error(task.check(torch.float32), self._exact[task.what])
        self._tasks.append((task, error, []))

    def measure(self) -> tuple[Figure, ...]:
        """The least of as many rounds as there is time for: what else runs on the machine only adds to it."""
        self._exact = {}
        end = time.perf_counter() + SECONDS
        with torch.random.fork_rng(random_devices()):
            for number in range(MOST):
                if number >= LEAST and time.perf_counter() > end:
                    break
                for task, _, times in self._tasks:
                    with on_route(task.route):
                        times.append(self._time(task))
        return tuple(
            Figure(each.what, each.route, each.way, round(1000 * min(times), 4), each.count, error)
            for each, error, times in self._tasks
        )

    def _time(self, task: Task) -> float:
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
