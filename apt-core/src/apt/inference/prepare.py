"""A trained model made ready to write: attention folded, weights in fewer bits.

Writing a token at a time reads every weight once for each token, so its speed is that of memory: half of the bytes are nearly
twice the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from apt.errors import UserError
from apt.inference.ahead import AheadStep
from apt.inference.half import HalfLinear, RowLinear
from apt.inference.int8 import Int8Linear
from apt.layers.cache import KVCache
from apt.layers.units import has_units
from apt.modeling.compiler import check_compiler
from apt.modeling.encoder_decoder import EncoderDecoder
from apt.modeling.model import Decoder

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(
    model: Decoder,
    *,
    dtype: Precision = "fp32",
    quantize: Literal["int8"] | None = None,
    compiled: bool = False,
    device: torch.device | None = None,
) -> float:
    """Change a model in place, for inference alone; returns how much of the weights that a token meets is in int8 now.

    bf16 keeps every scheduled value in float32. int8 quantises each linear layer, the head too (see `Int8Linear`). `compiled`
    compiles the writing of a token, which then has less to do beside its products. `device` is where the model will be, if it is
    not there yet. Raises `UserError` for a combination that does not exist.
    """
    where = model.embedding.weight.device if device is None else device
    if compiled and not model.supports_kv_cache:
        raise UserError("--compile: is for attention with a KV cache, and the model's has none")
    if quantize is not None and dtype != "fp32":
        raise UserError(f"--quantize {quantize}: its activations are float32; leave --dtype {dtype} out")
    check_device(quantize, where)
    if compiled and where.type == "cpu":
        check_compiler("--compile")
    for block, name, layer in _attention(model):
        setattr(block, name, _fold(layer))
    model.eval().requires_grad_(False)  # what was folded has weights of its own
    if dtype != "fp32":
        _cast(model, DTYPES[dtype])
        for parent, name, linear in _linears(model) if where.type == "cpu" else ():
            if has_units():
                setattr(parent, name, RowLinear(linear))
            elif HalfLinear.is_worth_it() and HalfLinear.supports(linear):
                setattr(parent, name, HalfLinear(linear))
    if compiled:
        model.compile_step(AheadStep if where.type == "cpu" else None)
    return _quantize(model) if quantize is not None else 0.0


@torch.inference_mode()
def get_ready(model: Decoder) -> None:
    """Compile now what one text's first tokens would wait for, where `prepare` was told to and the CPU is to write."""
    if not model.step_is_compiled or model.embedding.weight.device.type != "cpu" or isinstance(model, EncoderDecoder):
        return
    if model.max_seq_len < 3:
        return  # what a cache's last place takes is not compiled
    caches = model.create_cache(1)
    model(torch.zeros(1, 2, dtype=torch.long), cache=caches, last=1)
    model(torch.zeros(1, 1, dtype=torch.long), cache=caches, last=1)
    # As long as the context is, no text goes round.
    rings = [each for each in caches if isinstance(each, KVCache) and each.rolling and each.slots < model.max_seq_len]
    for each in rings:
        each.length = each.slots
    if rings:
        model(torch.zeros(1, 1, dtype=torch.long), cache=caches, last=1)


def check_device(quantize: str | None, device: torch.device) -> None:
    """Raise `UserError` where weights in eight bits were to be on another device than the CPU."""
    if quantize is not None and device.type != "cpu":
        raise UserError(f"--quantize {quantize}: is for the CPU; use --dtype bf16 on a GPU")


@contextmanager
def folded(model: Decoder) -> Iterator[None]:
    """Attention layers that can be folded are, until the block of code ends; the model itself is not changed."""
    layers = list(_attention(model))
    try:
        for block, name, layer in layers:
            setattr(block, name, _fold(layer))
        yield
    finally:
        for block, name, layer in layers:
            setattr(block, name, layer)


def _attention(model: Decoder) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every attention layer, the block that it is in, and its name there."""
    for block in model.all_blocks():
        for name, layer in list(block.named_children()):
            if name in ("attention", "cross"):
                yield block, name, layer


def _fold(layer: nn.Module) -> nn.Module:
    """The same function in fewer products, where the layer has a `fold` that gives it."""
    fold = getattr(layer, "fold", None)
    return fold() if callable(fold) else layer


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                # A tied weight is cast once, and stays one.
                parameter.data = parameter.data.to(dtype)
                setattr(module, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dim():
                setattr(module, name, buffer.to(dtype))


def _quantize(model: Decoder) -> float:
    # The embedding's rows are looked up; a head that is tied to it becomes a copy of its own, in eight bits.
    multiplied = {id(each): each.numel() for each in model.parameters() if each is not model.embedding.weight}
    total, done = sum(multiplied.values()), 0
    if model.head.weight is model.embedding.weight:
        total += model.head.weight.numel()
    for parent, name, linear in _linears(model):
        done += linear.weight.numel()
        setattr(parent, name, Int8Linear(linear))
    return done / total


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer, with the module that it is in and its name there."""
    # Experts may be one layer with weights [experts, out, in]: they stay as they are.
    return [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and child.weight.dim() == 2
    ]
