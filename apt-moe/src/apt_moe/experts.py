"""Many experts as one layer: any provider's feed-forward layer, with every parameter stacked to [experts, ...].

The stacked layer keeps its class and its parameters' names. Running it under `_Grouped` turns each of its linear maps
into one grouped product over all experts' rows; everything between them (activations, gates, dropout) works on rows
and does not ask whose they are. A layer that uses its parameters in any other way (a norm's gain, a scale of its own)
is found out when it is built, by a trial on the meta device, and is then run expert by expert instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from apt.errors import Fault, OptionsError
from apt.layers import Part, as_part
from apt_moe.grouped import Kernel, grouped_linear
from apt_moe.hidden import hidden_axes

if TYPE_CHECKING:
    from apt.core.providers import FFNProvider

Backend = Literal["naive", "loop", "bmm", "grouped_mm"]
SMALL, MANY = 1 << 14, 16
"""Where there are more experts, of matrices with fewer numbers, a loop in Python costs more than the kernel's own.

Measured on the CPU (docs/moe.md): 8 experts of 512 to 32,768 numbers, the loop takes 0.89 to 1.03 of `grouped_mm`; 64
experts below 16,384 numbers 1.05 to 1.32, from there on 0.95 to 1.13.
"""


def choose_backend(device: torch.device, largest: int, experts: int) -> Backend:
    """How to run so many `experts` whose largest matrix has `largest` numbers.

    On the CPU the loop, except where Python is what takes the time. On GPUs `grouped_mm`: on an H100 it was the fastest in
    bfloat16 at every size (docs/moe.md), and it needs no numbers from the device. In float32 it reads the offsets back as
    the loop does, and with some 256 tokens `bmm` took 0.35 to 0.92 of its time; but `bmm` has as many rows for every
    expert as the busiest, so that its memory and time depend on the balance, and it is to be asked for.
    """
    if device.type == "cpu" and (largest >= SMALL or experts <= MANY):
        return "loop"
    return "grouped_mm"


class Experts(nn.Module):
    """`num_experts` independent layers of one provider, run together on rows that are sorted by expert."""

    stacked = True
    """For the optimizer: a bias [experts, out] is a stack of vectors, not a matrix."""

    def __init__(
        self, provider: FFNProvider, num_experts: int, d_model: int, d_ff: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.num_experts, self.d_ff = num_experts, d_ff
        self.axes = hidden_axes(provider, d_model, d_ff, activation)
        """Parameter name -> the axis of the hidden units in one expert."""
        self.layer = _stacked(provider, num_experts, (d_model, d_ff, dropout, activation))
        self.largest = max((stack[0].numel() for stack in self.layer.parameters()), default=0)
        self.grouped = _can_group(provider, (d_model, d_ff, dropout, activation))

    def forward(
        self, rows: Tensor, offsets: Tensor, experts: Tensor, backend: Backend = "loop", tail: bool = True
    ) -> Tensor:
        """`rows` [rows, d_model] -> the same; `offsets` [experts] and `experts` [rows] as in `apt_moe.dispatch.Plan`.

        What comes out for rows that no expert owns is finite and otherwise unspecified. `tail` is False where there are
        no such rows, which spares clearing them.
        """
        if not self.grouped:
            return self._one_by_one(rows, offsets)
        if backend == "bmm":
            return self._padded(rows, offsets, experts)
        kernel: Kernel = "grouped_mm" if backend == "grouped_mm" else "loop"
        with _Grouped(partial(grouped_linear, offsets=offsets, experts=experts, kernel=kernel, tail=tail)):
            return _output(self.layer(rows.unsqueeze(0))).squeeze(0)

    def every(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """sum_e shares[:, e] f_e(tokens), every expert on all `tokens` [tokens, d_model]: the reference.

        `shares` [tokens, experts] is 0 where a token is not sent.
        """
        stacks = {name: stack.unbind(0) for name, stack in self.layer.named_parameters()}
        total = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, shares.dtype))
        for expert in range(self.num_experts):
            weights = {name: stack[expert] for name, stack in stacks.items()}
            output = _output(torch.func.functional_call(self.layer, weights, (tokens.unsqueeze(0),))).squeeze(0)
            total = total + shares[:, expert, None] * output
        return total

    def few(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """sum_j w_j f_{e_j}(token), expert after expert: for so few `tokens` [tokens, d_model] that sorting them would cost more.

        `indices` and `weights` [tokens, k]; the numbers are waited for, and there is no gradient: it is for writing on the CPU.
        """
        owners = [owner._parameters for owner in self.layer.modules() if owner._parameters]
        stacks = [dict(owner) for owner in owners]
        outputs = []
        try:
            for row, experts in zip(tokens.unsqueeze(1), indices.tolist(), strict=True):
                for expert in experts:
                    # What `functional_call` does, which takes longer than a small expert.
                    for owner, stack in zip(owners, stacks, strict=True):
                        owner.update((name, each[expert]) for name, each in stack.items() if each is not None)  # type: ignore[misc]
                    outputs.append(_output(self.layer(row.unsqueeze(0))).squeeze(0))
        finally:
            for owner, stack in zip(owners, stacks, strict=True):
                owner.update(stack)
        return (torch.cat(outputs).view(*indices.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def gathered(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The same on an accelerator, where nothing is waited for: each choice's matrices are copied, and multiplied at once."""
        rows = tokens.unsqueeze(1).expand(*indices.shape, -1).reshape(-1, tokens.shape[1])
        with _Grouped(partial(_gathered_linear, experts=indices.reshape(-1))):
            output = _output(self.layer(rows.unsqueeze(0))).squeeze(0)
        return (output.view(*indices.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def _padded(self, rows: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
        """As many rows for each expert as the busiest has, and one batched product for each linear map."""
        starts = torch.cat([offsets.new_zeros(1), offsets])
        room = max(1, int(starts.diff().max()))
        places = experts * room + torch.arange(rows.shape[0], device=rows.device) - starts[experts]
        owned = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
        last = len(offsets) * room
        places = torch.where(owned, places, last)
        padded = rows.new_zeros(last + 1, rows.shape[1]).index_copy(0, places, rows)[:-1]
        with _Grouped(partial(_batched_linear, room=room)):
            output = _output(self.layer(padded.unsqueeze(0))).squeeze(0)
        return torch.cat([output, output.new_zeros(1, output.shape[1])]).index_select(0, places)

    def _one_by_one(self, rows: Tensor, offsets: Tensor) -> Tensor:
        # unbind, not weight[e]: each index would make a gradient of the full stack's size.
        held = {name: _local(stack) for name, stack in self.layer.named_parameters()}
        stacks = {name: stack.unbind(0) for name, stack in held.items()}
        pieces, start = [], 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                weights = {name: stack[expert] for name, stack in stacks.items()}
                piece = torch.func.functional_call(self.layer, weights, (rows[start:end].unsqueeze(0),))
                pieces.append(_output(piece).squeeze(0))
            start = end
        if not pieces:
            # Gradients of zeros all the same: ranks that share experts out wait for one another on the way back.
            nothing = rows[:0].sum() + sum(stack[:0].sum() for stack in held.values())
            return torch.zeros_like(rows) + nothing
        pieces.append(rows.new_zeros(rows.shape[0] - start, rows.shape[1]))
        return torch.cat(pieces)


class _Grouped(TorchFunctionMode):
    """While it is on, a linear map with a stacked weight [experts, out, in] is `product` (rows, weight, bias)."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(
        self, func: object, types: object, args: tuple[Tensor, ...] = (), kwargs: Mapping[str, Tensor] | None = None
    ) -> object:
        if func is functional.linear and args[1].dim() == 3:
            return _linear(self.product, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


class _NotLinear(Exception):
    """A stacked parameter is used by something that is not a linear map."""


class _Trial(_Grouped):
    """Raises `_NotLinear` where a stacked parameter is used by anything but a linear map."""

    def __init__(self, stacks: Iterable[Tensor]) -> None:
        offsets = torch.zeros(2, dtype=torch.int32, device="meta")
        super().__init__(
            partial(grouped_linear, offsets=offsets, experts=torch.zeros(4, dtype=torch.long, device="meta"))
        )
        self.stacks = {id(stack) for stack in stacks}

    def __torch_function__(
        self, func: object, types: object, args: tuple[Tensor, ...] = (), kwargs: Mapping[str, Tensor] | None = None
    ) -> object:
        used = [id(value) in self.stacks for value in tree_leaves((args, kwargs))]
        if not any(used) or (func is functional.linear and not used[0] and args[1].dim() == 3):
            return super().__torch_function__(func, types, args, kwargs)
        try:
            result = super().__torch_function__(func, types, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise _NotLinear from error  # a shape that one expert's arithmetic cannot take
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):
            raise _NotLinear
        return result  # its shape, its dtype


def _linear(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    rows = product(input.reshape(-1, input.shape[-1]), _local(weight), None if bias is None else _local(bias))
    return rows.view(*input.shape[:-1], rows.shape[-1])


def _local(stack: Tensor) -> Tensor:
    """This rank's experts, where they are shared out."""
    return stack.to_local() if isinstance(stack, DTensor) else stack


def _batched_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, *, room: int) -> Tensor:
    """`rows` [experts * room, in]."""
    product = torch.matmul(rows.view(-1, room, rows.shape[1]), weight.transpose(1, 2))
    return (product if bias is None else product + bias.unsqueeze(1)).flatten(0, 1)


def _gathered_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, *, experts: Tensor) -> Tensor:
    """`rows` [rows, in], row n by the matrix of expert ``experts[n]``."""
    product = torch.bmm(weight.index_select(0, experts), rows.unsqueeze(-1)).squeeze(-1)
    return product if bias is None else product + bias.index_select(0, experts)


def _stacked(provider: FFNProvider, num_experts: int, sizes: tuple[int, int, float, str]) -> nn.Module:
    """A layer whose parameters are those of `num_experts` layers, each initialised by itself."""
    layers = (make_layer(provider, sizes) for _ in range(num_experts))
    stacked = next(layers)
    stacks = {}
    for name, parameter in list(stacked.named_parameters()):
        stacks[name] = torch.empty(num_experts, *parameter.shape, dtype=parameter.dtype, device=parameter.device)
        stacks[name][0] = parameter.detach()
    for expert, layer in enumerate(layers, start=1):
        for name, parameter in layer.named_parameters():
            stacks[name][expert] = parameter.detach()
    replace(stacked, stacks)
    return stacked


def _can_group(provider: FFNProvider, sizes: tuple[int, int, float, str]) -> bool:
    """Whether the provider's layer touches its parameters through linear maps alone."""
    with torch.device("meta"):
        layer = make_layer(provider, sizes)
        replace(layer, {name: torch.empty(2, *p.shape, dtype=p.dtype) for name, p in layer.named_parameters()})
        rows = torch.empty(1, 4, sizes[0])
    try:
        with torch.no_grad(), warnings.catch_warnings(), _Trial(layer.parameters()):
            warnings.simplefilter("ignore")  # what odd shapes provoke here says nothing to anyone
            layer(rows)
    except _NotLinear:
        return False
    return True


def make_layer(provider: FFNProvider, sizes: tuple[int, int, float, str]) -> nn.Module:
    """One layer of the provider, that is sure to be a module."""
    layer = provider.create_layer(*sizes)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"ffn.{provider.get_name()} makes {type(layer).__name__}, which is no torch.nn.Module")
    return layer


def replace(layer: nn.Module, tensors: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Put a new parameter of these numbers in the place of each.

    One that has several names keeps them all, and one that is not trained still is not.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    made = []
    for before, same in names.items():
        parameter = nn.Parameter(tensors[same[0]], requires_grad=before.requires_grad)
        for name in same:
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, parameter)
        made.append(parameter)
    return made


def _output(result: Tensor | Part) -> Tensor:
    part = as_part(result)
    if part.losses:
        raise OptionsError(
            "ffn", "moe", [Fault("expert", f"an expert cannot bring losses of its own ({', '.join(part.losses)})")]
        )
    return part.output
