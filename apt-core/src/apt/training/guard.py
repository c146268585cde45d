"""Numbers that are not finite, and memory that is not enough: where they came from, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apt.core.resolution import record_of
from apt.errors import UserError
from apt.hookspecs import Batch
from apt.layers import as_part
from apt.modeling.parts import BoundPart, find_parts


@torch.no_grad()
def find_source(model: nn.Module, batches: list[Batch]) -> str:
    """Whose modules first produce a number that is not finite on these batches, or whose gradients are not.

    The forward pass is repeated with the same weights; no random state is left changed.
    """
    first: list[str] = []

    def note(part: BoundPart) -> object:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            results = [output] if isinstance(output, Tensor) else [as_part(output).output] if output else []  # type: ignore[arg-type]
            if not first and any(not bool(each.isfinite().all()) for each in results):
                record = record_of(part.provider)
                first.append(f"{record.key} ({record.distribution} {record.version}), {part.path}")

        return part.module.register_forward_hook(hook)

    handles = [note(part) for part in find_parts(model)]
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        for batch in batches:
            model(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])
    if first:
        return f"first in the output of {first[0]}"
    return _gradients(model)


def _gradients(model: nn.Module) -> str:
    """Where gradients are not finite, the last parameter first: the backward pass comes by it first."""
    named = [(name, each.grad) for name, each in model.named_parameters() if each.grad is not None]
    broken = [name for name, grad in reversed(named) if not bool(grad.isfinite().all())]
    if not broken:
        return "in the loss alone"
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"every output is finite; in the gradients of {', '.join(broken[:3])}{more}"


@contextlib.contextmanager
def explain_memory() -> Iterator[None]:
    """Say what to lower where memory is not enough."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(_advice(error)) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UserError(_advice(error)) from error


def _advice(error: BaseException) -> str:
    what = str(error).strip().splitlines()
    return (
        f"out of memory ({what[0] if what else type(error).__name__}); lower training.batch_size and raise "
        "training.accumulate by as much, set training.recompute: true, or lower model.max_seq_len; `apt-core check` reckons "
        "what a step takes"
    )
