"""Everything that a run needs before its first step, put together from a profile: text, model, optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.providers import AttentionProvider, Tokenizer
from apt.core.resolve import Resolved
from apt.core.schedules import run_length
from apt.data.batches import Batches, make_batches
from apt.data.corpus import first_batch, require, steps_per_epoch
from apt.data.pairs import PairBatches
from apt.data.prepare import Prepared, prepare
from apt.data.tokens import TokenSplit
from apt.errors import UserError
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import scheduled_buffers, set_active
from apt.training.optim import learning_rate, make_optimizer
from apt.training.parallel import is_split, shard
from apt.training.proof import ProofOfUse
from apt.training.ranks import Ranks


@dataclass(frozen=True)
class Assembly:
    """The parts of a run. Every plugin's parts are off."""

    device: torch.device
    corpus: Prepared
    tokenizer: Tokenizer
    validation: TokenSplit
    batches: Batches | PairBatches
    steps_per_epoch: int
    first_batch: Callable[[int], int]
    """The number of the micro-batch that comes after so many steps' worth of text."""
    max_steps: int
    max_epochs: int
    model: Decoder
    buffers: dict[str, list[Tensor]]
    optimizer: Optimizer
    rate: Callable[[int], float]
    proof: ProofOfUse
    is_split: bool
    """Whether each rank has a part of the model alone."""


def assemble(
    config: APTConfig,
    resolved: Resolved,
    hooks: HookRunner,
    ranks: Ranks,
    checkpoint: Path | None,
    console: Console,
) -> Assembly:
    """Read the text, build the model and its optimizer; the tokenizer is the checkpoint's where there is one.

    Raises `UserError` and its kin where the text, the machine or the profile does not allow it.
    """
    training = config.training
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    device = pick_device(config.hardware.device, "hardware.device")
    attention = resolved.providers["attention"]
    if isinstance(attention, AttentionProvider) and not attention.supports_training(device.type):
        raise UserError(
            f"model.attention: {attention.get_name()!r} has no backward pass on the {device.type}; "
            "train on another device (hardware.device), or with another attention"
        )
    corpus = prepare(config, resolved, console, checkpoint)
    train, validation = corpus.splits["train"], corpus.splits["validation"]
    require(train, "train", config.max_seq_len)
    require(validation, "validation", config.max_seq_len)
    batches = make_batches(train, config)
    epoch = steps_per_epoch(config, batches.batches_per_pass)
    max_steps, max_epochs = run_length(training, epoch)
    random.seed(training.seed)
    np.random.seed(training.seed)
    torch.manual_seed(training.seed)
    model = ModelBuilder(config, resolved=resolved).build_model().to(device)
    model.recompute = training.recompute
    for plugin in config.plugins:
        set_active(model, plugin, False)
    hooks.hook.apt_model_built(config=config, model=model)
    shard(model, config, ranks)
    if ranks.rank:
        # The weights are the same everywhere, what is drawn in training is not.
        torch.manual_seed(training.seed + 1_000_003 * ranks.rank)
    return Assembly(
        device=device,
        corpus=corpus,
        tokenizer=corpus.tokenizer,
        validation=validation,
        batches=batches,
        steps_per_epoch=epoch,
        first_batch=partial(first_batch, config, batches.batches_per_pass),
        max_steps=max_steps,
        max_epochs=max_epochs,
        model=model,
        buffers=scheduled_buffers(model),
        optimizer=make_optimizer(model, config),
        rate=learning_rate(config, max_steps),
        proof=ProofOfUse(model, resolved.plugins),
        is_split=is_split(config, ranks),
    )


def pick_device(asked: str, asked_by: str) -> torch.device:
    """Where to compute: ``auto`` is the GPU where there is one. Raises `UserError` for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{asked_by}: cuda is asked for, but PyTorch sees no GPU; use auto or cpu")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")
