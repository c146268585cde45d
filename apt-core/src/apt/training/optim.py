"""The optimizer and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from apt.core.config import APTConfig
from apt.layers.sharded import mesh_of
from apt.modeling.model import Decoder


def make_optimizer(model: Decoder, config: APTConfig) -> Optimizer:
    """The profile's optimizer, with weight decay on matrices alone.

    Every parameter has its memory from the start, inert ones too, so that what a checkpoint holds never changes its shape. A
    parameter without a gradient is left alone: no decay, no step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What a module with `stacked = True` holds is many of one kind along the first dimension: a stack of vectors is no matrix.
    modules = (module for module in model.modules() if getattr(module, "stacked", False))
    stacked = {id(each) for module in modules for each in module.parameters()}
    if config.training.optimizer == "adamw":
        optimizer: Optimizer = _adamw(parameters, config, stacked)
    else:
        inside = {id(each) for block in model.all_blocks() for each in block.parameters()} - stacked
        matrices = [each for each in parameters if each.dim() == 2 and id(each) in inside]
        chosen = {id(each) for each in matrices}
        optimizer = MuonWithAdamW(matrices, [each for each in parameters if id(each) not in chosen], config, stacked)
    for parameter in parameters:
        optimizer.state[parameter] = (
            {"momentum_buffer": torch.zeros_like(parameter)}
            if isinstance(optimizer, MuonWithAdamW) and optimizer.is_muons(parameter)
            else {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        )
    return optimizer


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of blocks, AdamW for all else, as one optimizer with one memory and one list of groups.

    Muon orthogonalises the momentum of a whole matrix; embeddings, the head, vectors and stacked experts are none. Its updates
    are scaled to the size of AdamW's, so that both share the learning rate and the decay (Jordan et al. 2024; Liu et al. 2025,
    arXiv:2502.16982, section 2.2).
    """

    def __init__(
        self, matrices: Sequence[Tensor], others: Sequence[Tensor], config: APTConfig, stacked: Container[int] = ()
    ) -> None:
        self.adamw = _adamw(others, config, stacked)
        self.muon = Muon(
            cast("Iterable[nn.Parameter]", matrices),
            lr=config.base_lr,
            weight_decay=config.weight_decay,
            momentum=config.training.betas[1],
            adjust_lr_fn="match_rms_adamw",
        )
        self._matrices = {id(each) for each in matrices}
        groups = [*self.muon.param_groups, *self.adamw.param_groups]
        super().__init__([dict(each) for each in groups], {"lr": config.base_lr})
        # The same groups and the same memory: what is set or read here is what the two of them use.
        self.param_groups = groups
        self.muon.state = self.adamw.state = self.state

    def is_muons(self, parameter: Tensor) -> bool:
        """Whether this parameter is one of Muon's."""
        return id(parameter) in self._matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()

    def __str__(self) -> str:
        stacked = sum(each.dim() > 2 for group in self.adamw.param_groups for each in group["params"])
        rest = sum(len(group["params"]) for group in self.adamw.param_groups) - stacked
        return (
            f"muon trains {len(self._matrices)} matrices of the blocks; adamw the {rest} embeddings, heads and vectors"
            + (f", and {stacked} stacks of matrices, such as experts, which muon cannot take" if stacked else "")
        )


def _adamw(parameters: Sequence[Tensor], config: APTConfig, stacked: Container[int]) -> AdamW:
    """Loshchilov and Hutter 2019, arXiv:1711.05101. `stacked` holds the `id` of what has one dimension more than one of it."""
    alike: dict[tuple[object, bool], list[Tensor]] = {}
    for each in parameters:
        alike.setdefault((mesh_of(each), each.dim() - (id(each) in stacked) >= 2), []).append(each)
    groups = [
        {"params": each, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (_, is_matrix), each in alike.items()
    ]
    return AdamW(groups, lr=config.base_lr, betas=config.training.betas, fused=True)


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer changes nothing where its `found_inf` is 1, and nobody looks on who would take it for one.

    So does PyTorch's fused AdamW. What a plugin has put around the step is asked for a step that is none.
    """
    looked_at = "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer) is AdamW and not looked_at and all(group.get("fused") for group in optimizer.param_groups)


def learning_rate(config: APTConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of each step: linear warm-up, then the profile's schedule down to `min_lr_ratio` of it.

    cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5; wsd: warm-up, stable, and a linear decay over the last
    fifth (Hu et al. 2024, arXiv:2404.06395).
    """
    high, low = config.base_lr, config.base_lr * config.training.min_lr_ratio
    warmup, shape = config.warmup_steps, config.training.lr_schedule

    def at(step: int) -> float:
        if step < warmup:
            return high * (step + 1) / warmup
        p = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        if shape == "constant":
            return high
        if shape == "linear":
            return high + (low - high) * p
        if shape == "wsd":
            return high + (low - high) * max(0.0, (p - 0.8) / 0.2)
        return low + (high - low) * (1 + math.cos(math.pi * p)) / 2

    return at
