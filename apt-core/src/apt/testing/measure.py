"""What PyTorch itself counts: operations, bytes that are kept for the backward pass, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apt.layers import Part, as_part
from apt.testing.kit import demand

ROUNDING = 1e-6
"""The inputs are of size 1; a gradient that is smaller everywhere says nothing."""


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations; attention is counted under the MATH backend, since others are counted as 0 on CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def saved_bytes(module: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the distinct storages, other than parameters, that a forward pass keeps for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(kept.values())


def idle_modules(module: nn.Module) -> set[nn.Module]:
    """What the part itself says takes no part as things stand."""
    idle: set[nn.Module] = set()
    for each in module.modules():
        say = getattr(each, "idle", None)
        if callable(say):
            idle.update(inner for said in say() for inner in said.modules())
    return idle


def scalar(result: Tensor | Part) -> Tensor:
    """A number that every output and every loss has a part in."""
    part = as_part(result)
    weights = torch.randn(part.output.shape, generator=torch.Generator().manual_seed(5))
    return (part.output.float() * weights).sum() + sum(part.losses.values())


def demand_gradients(module: nn.Module) -> None:
    """Every trainable parameter that is not idle has a finite gradient that is not all zero."""
    idle = idle_modules(module)
    for path, inner in module.named_modules():
        if inner in idle:
            continue
        for name, parameter in inner.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if not parameter.requires_grad:
                continue
            demand(parameter.grad is not None, f"the parameter {full} gets no gradient: nothing uses it")
            assert parameter.grad is not None
            demand(parameter.grad.isfinite().all(), f"the gradient of {full} is not finite")
            size = parameter.grad.abs().max().item()
            demand(
                size > ROUNDING, f"the gradient of {full} is nothing but rounding ({size:.0e}): it is detached, or dead"
            )


def demand_finite(loss: Tensor, inputs: Sequence[Tensor], what: str) -> None:
    """Whether the gradient of a loss to each of these, where it has one, is finite."""
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    demand(all(each is None or bool(each.isfinite().all()) for each in gradients), f"{what} is not finite")


def demand_close(seen: Tensor, right: Tensor, message: str, tolerance: float = 1e-4) -> None:
    """Two tensors agree to `tolerance` of the largest number."""
    demand(seen.shape == right.shape, f"{message}: shapes {tuple(seen.shape)} and {tuple(right.shape)}")
    if torch.equal(seen, right):
        return  # infinities too
    limit = tolerance * max(1.0, right.abs().max().item()) if right.numel() else tolerance
    worst = (seen - right).abs().max().item() if right.numel() else 0.0
    demand(seen.isfinite().all(), f"{message}: not finite")
    demand(worst <= limit, f"{message}: they differ by {worst:.2e}, more than {limit:.0e}")


def demand_near(estimate: float, measured: float, what: str) -> None:
    """An estimate is within 10 % of what was measured."""
    demand(
        abs(estimate - measured) <= 0.1 * measured,
        f"{what}: the provider says {estimate:,.0f}, PyTorch counts {measured:,.0f}; within 10 % would be right",
    )
