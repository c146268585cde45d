"""Numbers that are not finite, and memory that is not enough: where they came from, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apt.core.resolution import describe
from apt.errors import PluginError, UserError, origin_of
from apt.hookspecs import Batch
from apt.layers import Part, as_part
from apt.layers.sharded import let_go, local
from apt.modeling.parts import BoundPart, find_parts
from apt.training.evaluate import untouched

OUT_OF_MEMORY = (
    *("allocate memory", "not enough memory", "ALLOC_FAILED"),
    # Sizes beyond what a number of 64 bits can say.
    *("Storage size calculation overflowed", "integer multiplication overflow", "Maximum allowed", "array is too big"),
    "Overflow when unpacking",
)
"""What errors say that have no type of their own: PyTorch's on the CPU, NumPy's, and those of a GPU's libraries."""


class Source(NamedTuple):
    """Where a number that is not finite came from: in the output of a part (0), in a loss (1), in gradients (2); and in words."""

    where: int
    what: str


@torch.no_grad()
def find_source(
    model: nn.Module, precision: torch.autocast, batches: list[Batch], losses: Mapping[str, Tensor]
) -> Source:
    """Whose modules first produce a number that is not finite on these batches, or which loss, or whose gradients are not.

    The forward pass is repeated with the same weights; no random state or buffer is left changed.
    """
    first: list[str] = []

    def note(part: BoundPart) -> RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            results = [output] if isinstance(output, Tensor) else [as_part(output).output] if output else []  # type: ignore[arg-type]
            if not first and any(not bool(each.isfinite().all()) for each in results):
                first.append(f"{describe(part.provider)}, {part.path}")

        return part.module.register_forward_hook(hook)

    handles = [note(part) for part in find_parts(model)]
    # Hooks see nothing of what is compiled.
    with untouched(model), precision, torch.compiler.set_stance("force_eager"):
        try:
            for batch in batches:
                model(*batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
            let_go(model)
    if first:
        return Source(0, f"first in the output of {first[0]}")
    broken = [name for name, value in losses.items() if name != "loss" and not bool(value.isfinite().all())]
    if broken:
        return Source(1, f"every part's output is finite; in the added loss {broken[0]!r}")
    # Gradients are every rank's, its loss a rank's own.
    own = "loss" in losses and not bool(losses["loss"].isfinite().all())
    return Source(1 if own else 2, _gradients(model) or ("in the loss alone" if own else _LARGE))


_LARGE = "every gradient is finite, and so large that their norm is not"


def _gradients(model: nn.Module) -> str:
    """Where gradients are not finite, the last parameter first: the backward pass comes by it first; else nothing."""
    parts = find_parts(model)
    named = [(name, each.grad) for name, each in model.named_parameters() if each.grad is not None]
    broken = [name for name, grad in reversed(named) if not bool(local(grad).isfinite().all())]
    if not broken:
        return ""
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    makers = [part.provider for part in parts if broken[0].startswith(f"{part.path}.")]
    made = f", which {describe(makers[-1])} made" if makers else ""
    return f"every output is finite; in the gradients of {', '.join(broken[:3])}{more}{made}"


@torch.no_grad()
def find_makers(model: nn.Module, batch: Batch, name: str) -> str:
    """Whose modules return a loss or a metric of this name on a batch, in words; nothing is left changed."""
    found: dict[str, None] = {}

    def note(part: BoundPart) -> RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if isinstance(output, Part) and (name in output.losses or name in output.metrics):
                found[describe(part.provider)] = None

        return part.module.register_forward_hook(hook)

    handles = [note(part) for part in find_parts(model)]
    with untouched(model), torch.compiler.set_stance("force_eager"):
        try:
            model(*batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
            let_go(model)
    return " and ".join(found) or "a part of the model"


@contextlib.contextmanager
def explain_memory() -> Iterator[None]:
    """Say what to lower where memory is not enough."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, TypeError, PluginError) as error:
        if not _is_memory(origin_of(error)):
            raise
        raise UserError(_advice(error)) from error


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = isinstance(error, RuntimeError | ValueError | TypeError)
    return told and any(words in str(error) for words in OUT_OF_MEMORY)


def _advice(error: BaseException) -> str:
    what = str(error).strip().splitlines()
    return (
        f"out of memory ({what[0] if what else type(error).__name__}); lower training.batch_size and raise "
        "training.accumulate by as much, set training.recompute: true, or lower model.max_seq_len or another size of the model; "
        "`apt-core check` reckons what a step takes"
    )
