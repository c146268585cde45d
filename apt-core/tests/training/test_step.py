"""One step: micro-batches make the gradient of a large batch, whatever the optimizer and the precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr
from torch import nn

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.data.batches import Batches
from apt.data.tokens import TokenSplit
from apt.errors import UserError
from apt.hookspecs import Batch, RunState, hookimpl
from apt.layers.memory import memory_for
from apt.modeling.compose import ModelBuilder
from apt.training.guard import Source, explain_memory, find_source
from apt.training.loss import LossStep
from apt.training.optim import MuonWithAdamW, make_optimizer
from apt.training.parallel import alike, clip, gradient_norm
from apt.training.ranks import Ranks
from apt.training.step import Step

STATE = RunState(0, 0, 1, 1)


def build(profile: Path, *sets: str) -> tuple[APTConfig, nn.Module]:
    loaded = load_profile(profile, sets=sets)
    torch.manual_seed(0)
    return loaded.config, ModelBuilder(loaded.config, resolved=loaded.resolved).build_model()


def gradient(profile: Path, batch: Batch, parts: int, *sets: str) -> dict[str, torch.Tensor]:
    """Of a batch in so many micro-batches, weighted as the trainer weighs them."""
    config, model = build(profile, *sets)
    step = LossStep(model, HookRunner(), config.training.precision)  # type: ignore[arg-type]
    mask = batch.mask
    assert mask is not None
    pieces = [Batch(*each) for each in zip(*(x.chunk(parts) for x in (batch.tokens, batch.targets, mask)), strict=True)]
    for piece in pieces:
        assert piece.mask is not None
        share, _ = step(STATE, piece, weight=float(piece.mask.sum() / mask.sum()), extra_weight=1 / parts)
        share.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_have_the_gradient_of_one_large_batch(
    profile_file: Path, precision: str, recompute: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 259, (8, 17), generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.rand(8, 16, generator=generator) < 0.7)
    sets = [f"training.precision={precision}", f"training.recompute={str(recompute).lower()}"]
    one, many = gradient(profile_file, batch, 1, *sets), gradient(profile_file, batch, 4, *sets)
    assert one.keys() == many.keys()
    tolerance = 1e-6 if precision == "fp32" else 2e-2
    for name, grad in one.items():
        torch.testing.assert_close(many[name], grad, atol=tolerance, rtol=tolerance if precision == "bf16" else 0)


def test_a_micro_batch_of_which_no_target_counts_adds_nothing(profile_file: Path) -> None:
    tokens = torch.randint(3, 259, (4, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[2:] = False
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask)
    one, many = gradient(profile_file, batch, 1), gradient(profile_file, batch, 2)
    for name, grad in one.items():
        torch.testing.assert_close(many[name], grad, atol=1e-6, rtol=0)


class Second(Ranks):
    """The second of two ranks; the first one has found what `first` says."""

    first = Source(2, "in gradients")

    def gather(self, value: Source) -> list[Source]:  # type: ignore[override]
        return [self.first, value]


@pytest.mark.parametrize(("loss", "named"), [(float("nan"), ", rank 1)"), (1.0, ")")])
def test_the_rank_is_named_whose_loss_is_not_finite_and_none_where_gradients_alone_are(
    profile_file: Path, loss: float, named: str
) -> None:
    config, model = build(profile_file)
    tokens = torch.randint(3, 259, (2, 17))
    parallel = SimpleNamespace(step=LossStep(model, HookRunner(), "fp32"))  # type: ignore[arg-type]
    step = SimpleNamespace(
        config=config, model=model, parallel=parallel, ranks=Second(1, 2), device=torch.device("cpu")
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    losses = {"loss": torch.tensor(loss)}
    told = Step._explain(step, STATE, 7, [Batch(tokens[:, :-1], tokens[:, 1:])], losses)  # type: ignore[arg-type]
    assert f"micro-batches 7 to 7 of seed {config.training.seed}{named}: " in told


def test_gradients_that_are_finite_and_too_large_for_a_norm_are_told_as_that(profile_file: Path) -> None:
    config, model = build(profile_file)
    tokens = torch.randint(3, 259, (2, 17))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    batches, losses = [Batch(tokens[:, :-1], tokens[:, 1:])], {"loss": torch.tensor(1.0)}
    precision = LossStep(model, HookRunner(), config.training.precision).autocast(tokens.device)  # type: ignore[arg-type]
    assert "so large that their norm is not" in find_source(model, precision, batches, losses).what
    assert "in the loss alone" in find_source(model, precision, batches, {"loss": torch.tensor(math.nan)}).what


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**62, 16),
        lambda: nn.Linear(2**40, 2**40),
        lambda: torch.empty(2**70),
        lambda: Batches(TokenSplit(np.zeros(100, np.uint16), 100, 1), 4, 2**62, 0).get(0),
        lambda: Batches(TokenSplit(np.zeros(100, np.uint16), 100, 1), 4, 2**48, 0).get(0),
    ],
)
def test_sizes_that_no_memory_holds_are_told_with_what_to_lower(ask: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"out of memory .* lower training\.batch_size"), explain_memory():
        ask()


class Greedy(Plugin):
    """Meets an error in a hook."""

    _error: Exception = PrivateAttr(default_factory=MemoryError)

    @hookimpl
    def apt_step_start(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("you tried to allocate memory\nC++:")],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_in_a_plugin_is_told_with_its_name_and_with_what_to_lower(error: Exception) -> None:
    greedy = Greedy()
    greedy._error = error
    told = r"out of memory \(plugin 'greedy' .* failed in apt_step_start at step 0: .*\); lower training\.batch_size"
    state = RunState(0, 0, 1, 1, plugins_on=("greedy",))
    with pytest.raises(UserError, match=told), explain_memory():
        HookRunner({"greedy": greedy}).hook.apt_step_start(state=state)


def test_clipping_brings_the_whole_gradient_to_the_limit(profile_file: Path) -> None:
    _, model = build(profile_file)
    model(torch.randint(3, 259, (2, 16))).logits.square().mean().backward()
    parameters = list(model.parameters())
    groups = alike(parameters)
    norm = gradient_norm(groups)
    assert norm.item() == pytest.approx(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
    clip(groups, 0.0, norm)
    assert gradient_norm(groups).item() == pytest.approx(norm.item())
    clip(groups, 0.5 * norm.item(), norm)
    assert gradient_norm(groups).item() == pytest.approx(0.5 * norm.item(), rel=1e-4)


def test_decay_is_of_matrices_alone(profile_file: Path) -> None:
    for optimizer in ("adamw", "muon"):
        config, model = build(profile_file, f"training.optimizer={optimizer}", "training.weight_decay=0.5")
        made = make_optimizer(model, config)
        for group in made.param_groups:
            for parameter in group["params"]:
                assert (group["weight_decay"] == 0.5) is (parameter.dim() >= 2)
        grouped = [id(each) for group in made.param_groups for each in group["params"]]
        assert sorted(grouped) == sorted(id(each) for each in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stack_of_vectors_is_no_matrix(profile_file: Path, optimizer: str) -> None:
    config, model = build(profile_file, f"training.optimizer={optimizer}", "training.weight_decay=0.5")
    experts = nn.Linear(8, 8)
    experts.stacked = True  # type: ignore[assignment]
    experts.weight, experts.bias = nn.Parameter(torch.ones(4, 8, 8)), nn.Parameter(torch.ones(4, 8))
    model.get_submodule("blocks.0").add_module("experts", experts)
    made = make_optimizer(model, config)  # type: ignore[arg-type]
    decay = {id(each): group["weight_decay"] for group in made.param_groups for each in group["params"]}
    assert (decay[id(experts.weight)], decay[id(experts.bias)]) == (0.5, 0.0)
    assert made.state[experts.bias].keys() == made.state[experts.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_takes_the_matrices_of_blocks_and_steps_with_adamw_as_one(profile_file: Path) -> None:
    config, model = build(profile_file, "training.optimizer=muon")
    made = make_optimizer(model, config)
    assert isinstance(made, MuonWithAdamW)
    names = {name for name, parameter in model.named_parameters() if made.is_muons(parameter)}
    assert names
    assert all(name.startswith("blocks.") for name in names)
    assert "embedding.weight" not in names
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.randint(3, 259, (2, 16))).logits.square().mean().backward()
    for group in made.param_groups:
        group["lr"] = 0.0
    made.step()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    for group in made.param_groups:
        group["lr"] = 1e-2
    made.step()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)]
    made.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_momentum_is_inherited_as_moments_that_noise_would_have_left() -> None:
    torch.manual_seed(0)
    matrix, stack = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(3, 64, 64))
    config = APTConfig()
    optimizer = MuonWithAdamW([matrix], [stack], config)
    momentum = torch.zeros(64, 64)
    for _ in range(200):
        momentum.lerp_(0.3 * torch.randn(64, 64), 1 - config.training.betas[1])
    optimizer.state[matrix] = {"momentum_buffer": momentum}
    optimizer.state[stack] = {"step": torch.tensor(200.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    memory = memory_for(stack, matrix, optimizer)
    assert memory["step"] == 200
    assert torch.equal(memory["exp_avg"], momentum)
    assert memory["exp_avg_sq"].mean().item() == pytest.approx(0.3**2, rel=0.1)
    assert memory_for(matrix, matrix, optimizer) == {"momentum_buffer": momentum}
    assert memory_for(stack, nn.Parameter(torch.zeros(2)), optimizer) == {}
