from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from apt.core.providers import FFNProvider
from apt.errors import OptionsError
from apt_moe.hidden import hidden_axes, slice_units, units_first
from apt_moe.layer import MixtureOfExperts
from apt_moe.provider import MoE
from apt_moe.routers import TopK
from apt_moe.upcycling import upcycle

OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


def trained(optimizer: type[torch.optim.Optimizer], **chosen: object) -> tuple[MixtureOfExperts, torch.optim.Optimizer]:
    """A mixture that is off and whose dense layer has taken three steps."""
    torch.manual_seed(0)
    layer = MoE.model_validate({"experts": 4, **chosen}).create_layer(8, 16)
    layer.active = False
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepper = optimizer(layer.parameters(), lr=1e-2, **options)
    for _ in range(3):
        stepper.zero_grad()
        layer(torch.randn(2, 5, 8)).output.square().mean().backward()
        stepper.step()
    return layer, stepper


def pairs(layer: MixtureOfExperts) -> list[tuple[nn.Parameter, nn.Parameter]]:
    assert layer.dense is not None
    stacks = dict(layer.experts.layer.named_parameters())
    return [(dense, stacks[name]) for name, dense in layer.dense.named_parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_expert_gets_the_dense_layer_s_weights_and_its_optimizer_state(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    layer, stepper = trained(optimizer)
    upcycle(layer, stepper)
    for dense, stack in pairs(layer):
        assert all(expert.equal(dense) for expert in stack)
        state, stacked = stepper.state[dense], stepper.state[stack]
        assert state
        assert state.keys() == stacked.keys()
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                assert all(expert.equal(value) for expert in stacked[key])
            else:
                assert stacked[key] == value
            assert stacked[key] is not value or not isinstance(value, Tensor), "experts and dense layer share no memory"


def test_the_router_s_state_is_fresh() -> None:
    layer, stepper = trained(torch.optim.AdamW)
    upcycle(layer, stepper)
    assert layer.router.weight not in stepper.state


def test_after_the_switch_the_dense_layer_takes_no_more_steps() -> None:
    layer, stepper = trained(torch.optim.AdamW)
    upcycle(layer, stepper)
    layer.active = True
    before = [dense.detach().clone() for dense, _ in pairs(layer)]
    layer(torch.randn(2, 5, 8)).output.square().mean().backward()
    stepper.step()
    for (dense, stack), old in zip(pairs(layer), before, strict=True):
        assert dense.equal(old)
        assert not stack[0].equal(old)


def test_the_saved_optimizer_has_the_same_shapes_before_and_after() -> None:
    layer, stepper = trained(torch.optim.AdamW)
    upcycle(layer, stepper)
    layer.active = True
    layer(torch.randn(2, 5, 8)).output.square().mean().backward()
    stepper.step()
    saved = stepper.state_dict()
    again = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    again.load_state_dict(saved)
    for parameter in layer.parameters():
        assert again.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_mixture_without_a_dense_layer_says_what_it_lacks() -> None:
    with pytest.raises(RuntimeError, match="upcycle: true"):
        upcycle(MoE(upcycle=False).create_layer(8, 16))


@pytest.mark.parametrize("expert", ["default", "swiglu"])
@pytest.mark.parametrize(("granularity", "shared"), [(4, 0), (2, 1), (1, 2)])
def test_fine_grained_and_shared_experts_keep_the_function_and_the_input_s_gradient(
    expert: str, granularity: int, shared: int
) -> None:
    layer, stepper = trained(torch.optim.AdamW, expert=expert, granularity=granularity, shared=shared)
    x = torch.randn(2, 9, 8, requires_grad=True)
    dense = layer(x).output
    probe = torch.randn_like(dense)
    (dense_gradient,) = torch.autograd.grad((dense * probe).sum(), x)
    upcycle(layer, stepper)
    layer.active = True
    part = layer(x)
    (gradient,) = torch.autograd.grad((part.output * probe).sum(), x)
    torch.testing.assert_close(part.output, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-5, atol=1e-6)
    assert part.metrics["moe_load"].shape == (4 * granularity,)


def test_a_token_gets_all_slices_of_a_dense_layer_or_none() -> None:
    layer, _ = trained(torch.optim.AdamW, granularity=4)
    upcycle(layer)
    indices, _, _ = layer.router_provider.route(layer.router, torch.randn(1, 50, 8), False)
    groups = indices.sort(-1).values.unflatten(-1, (2, 4))
    assert (groups // 4 == groups[..., :1] // 4).all()
    assert (groups % 4 == torch.arange(4)).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_slices_of_hidden_units_are_disjoint_and_complete(parts: int, width: int, runs: int, last: bool) -> None:
    d_ff = parts * width
    tensor = torch.arange(3 * runs * d_ff).reshape((3, runs * d_ff) if last else (runs * d_ff, 3))
    axis = int(last)
    slices = [slice_units(tensor, axis, d_ff, part, parts) for part in range(parts)]
    assert all(each.shape[axis] == runs * width for each in slices)
    assert torch.cat([each.flatten() for each in slices]).sort().values.equal(torch.arange(3 * runs * d_ff))
    for part, each in enumerate(slices):
        assert units_first(each, axis, width).equal(units_first(tensor, axis, d_ff)[part * width : (part + 1) * width])


def test_hidden_units_are_found_in_any_layer() -> None:
    swiglu = MoE(expert="swiglu").expert
    assert hidden_axes(swiglu, 8, 16) == {"up.weight": 0, "down.weight": 1}
    assert hidden_axes(MoE.model_validate({"expert": {"provider": "default", "bias": True}}).expert, 8, 8) == {
        "up.weight": 0,
        "up.bias": 0,
        "down.weight": 1,
    }


def test_an_output_s_offset_is_shared_out_among_the_slices() -> None:
    layer, _ = trained(torch.optim.AdamW, expert={"provider": "default", "bias": True}, granularity=2)
    x = torch.randn(1, 5, 8)
    dense = layer(x).output
    upcycle(layer)
    layer.active = True
    torch.testing.assert_close(layer(x).output, dense, rtol=1e-5, atol=1e-6)


class Normed(nn.Module):
    """Its hidden units see one another, so it is not the sum of its slices."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.down(self.up(x).softmax(-1))


class NormedProvider(FFNProvider):
    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Normed:
        return Normed(d_model, d_ff)

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        return 2 * d_model * d_ff + d_model + d_ff

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        return 4 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        return 4 * batch_size * seq_len * (d_model + 2 * d_ff)


def test_a_layer_that_is_not_the_sum_of_its_slices_is_refused() -> None:
    with pytest.raises(OptionsError, match="is not the sum of slices of its hidden units"):
        MoE(expert=NormedProvider(), granularity=2).create_layer(8, 16)
    assert MoE(expert=NormedProvider(), granularity=2, upcycle=False).create_layer(8, 16).experts.d_ff == 8


class NarrowProvider(NormedProvider):
    """As wide inside as keeps the parameters of a gated layer those of a plain one."""

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Normed:
        return Normed(d_model, 2 * d_ff // 3)


def test_a_layer_of_another_width_than_d_ff_is_an_expert_but_is_not_split_nor_drawn_anew() -> None:
    layer, stepper = trained(torch.optim.AdamW, expert=NarrowProvider())
    x = torch.randn(1, 5, 8)
    dense = layer(x).output
    upcycle(layer, stepper)
    layer.active = True
    torch.testing.assert_close(layer(x).output, dense, rtol=1e-5, atol=1e-6)
    assert all(
        torch.equal(stepper.state[stack]["exp_avg"][2], stepper.state[one]["exp_avg"]) for one, stack in pairs(layer)
    )
    for options in ({"granularity": 2}, {"redraw": 0.5}):
        with pytest.raises(OptionsError, match="has d_ff hidden units, to be split or drawn anew"):
            MoE.model_validate({"expert": NarrowProvider(), **options}).create_layer(8, 16)


class Gained(Normed):
    """It has a parameter of a single number."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.gain * super().forward(x)


class GainedProvider(NormedProvider):
    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Gained:
        return Gained(d_model, d_ff)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_remembered_of_a_single_number_is_carried_and_the_count_of_steps_stays_one(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    layer, stepper = trained(optimizer, expert=GainedProvider())
    upcycle(layer, stepper)
    layer.active = True
    layer(torch.randn(2, 5, 8)).output.square().mean().backward()
    dense, stack = next((one, stack) for one, stack in pairs(layer) if not one.dim())
    before = {key: value.clone() for key, value in stepper.state[stack].items()}
    for key, value in stepper.state[dense].items():
        torch.testing.assert_close(before[key], value if key == "step" else value.expand(4))
    stepper.step()


class Running(nn.Module):
    """It takes what it has seen so far off its hidden units, or divides them all by it, or takes it off its output."""

    def __init__(self, d_model: int, d_ff: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)
        self.register_buffer("seen", torch.ones({"units": (d_ff,), "scale": (), "output": (d_model,)}[way]))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        hidden = self.up(x).relu()
        output = self.down(hidden - self.seen) if self.way == "units" else self.down(hidden)
        output = output / self.seen if self.way == "scale" else output
        if self.training:
            numbers = {"units": hidden, "scale": x.square(), "output": output}[self.way].detach()
            self.seen.lerp_(numbers.mean() if self.way == "scale" else numbers.mean((0, 1)), 0.1)
        return output - self.seen if self.way == "output" else output


class RunningProvider(NormedProvider):
    way: Literal["units", "scale", "output"]

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Running:
        return Running(d_model, d_ff, self.way)


@pytest.mark.parametrize(("way", "granularity"), [("units", 1), ("scale", 1), ("output", 1), ("scale", 2)])
def test_experts_get_the_dense_layer_s_buffers(way: Literal["units", "scale", "output"], granularity: int) -> None:
    torch.manual_seed(0)
    mixture = MoE(experts=4, expert=RunningProvider(way=way), granularity=granularity, shared=1)
    layer = mixture.create_layer(8, 16)
    layer.active = False
    for _ in range(20):
        layer(torch.randn(2, 5, 8) + 0.5)
    x = torch.randn(2, 5, 8)
    before = layer.eval()(x).output
    buffers = {name: buffer for name, buffer in layer.named_buffers() if name.endswith("seen")}
    upcycle(layer)
    layer.active = True
    torch.testing.assert_close(layer(x).output, before, rtol=1e-5, atol=1e-6)
    assert len(buffers) == 3
    assert all(dict(layer.named_buffers())[name] is buffer for name, buffer in buffers.items())
    layer.train()(x)
    assert not buffers["experts.layer.seen"].equal(buffers["dense.seen"])


def test_buffers_that_slices_cannot_have_in_common_are_refused() -> None:
    with pytest.raises(OptionsError, match="keeps seen for its hidden units, and experts have one set of buffers"):
        MoE(expert=RunningProvider(way="units"), granularity=2).create_layer(8, 16)
    with pytest.raises(OptionsError, match="is not the sum of slices of its hidden units"):
        MoE(expert=RunningProvider(way="output"), granularity=2).create_layer(8, 16)


def test_buffers_that_are_made_in_use_are_carried_too() -> None:
    layer = MoE(experts=4).create_layer(8, 16)
    layer.dense.register_buffer("table", torch.arange(3.0))
    upcycle(layer)
    assert layer.experts.layer.table.equal(layer.dense.table)
    assert layer.experts.layer.table is not layer.dense.table


def test_a_width_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(OptionsError, match="3 does not divide d_ff, which is 16"):
        MoE(granularity=3).create_layer(8, 16)


def test_each_expert_draws_its_own_share_of_hidden_units_anew_whole_and_seeded() -> None:
    made = [trained(torch.optim.AdamW, redraw=0.5, redraw_seed=seed, expert="swiglu") for seed in (1, 1, 2)]
    for layer, stepper in made:
        upcycle(layer, stepper)
    layers = [layer for layer, _ in made]
    redrawn = []
    for layer in layers:
        changed: dict[str, Tensor] = {}
        for (dense, stack), (name, axis) in zip(pairs(layer), layer.experts.axes.items(), strict=True):
            units = torch.stack([units_first(each, axis, 16) for each in (stack - dense)])
            changed[name] = (units != 0).flatten(2).all(-1)
            assert changed[name].equal((units != 0).flatten(2).any(-1)), "a unit is drawn whole or kept whole"
        assert changed["up.weight"].equal(changed["down.weight"])
        redrawn.append(changed["up.weight"])
    assert redrawn[0].sum(1).tolist() == [8] * 4
    assert not redrawn[0][0].equal(redrawn[0][1])
    assert all(a.equal(b) for a, b in zip(layers[0].experts.parameters(), layers[1].experts.parameters(), strict=True))
    assert not redrawn[0].equal(redrawn[2])


def test_what_is_drawn_has_the_mean_and_deviation_of_the_dense_matrix() -> None:
    layer = MoE(experts=8, redraw=1.0).create_layer(32, 64)
    assert layer.dense is not None
    with torch.no_grad():
        layer.dense.up.weight.normal_(0.3, 2.0)
    upcycle(layer)
    drawn = layer.experts.layer.get_parameter("up.weight")
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.05)
    assert drawn.std().item() == pytest.approx(2.0, rel=0.05)


def test_moments_are_copied_fresh_or_scaled_to_what_an_expert_s_gradient_will_be() -> None:
    for moments, first, second in (("copied", 1, 1), ("scaled", 1 / 4, 1 / 16)):
        layer, stepper = trained(torch.optim.AdamW, moments=moments)
        upcycle(layer, stepper)
        for dense, stack in pairs(layer):
            for key, factor in (("exp_avg", first), ("exp_avg_sq", second)):
                torch.testing.assert_close(stepper.state[stack][key][2], stepper.state[dense][key] * factor)
            assert stepper.state[stack]["step"] == 3
    layer, stepper = trained(torch.optim.AdamW, moments="fresh")
    upcycle(layer, stepper)
    assert all(stack not in stepper.state for _, stack in pairs(layer))


def test_slices_carry_the_moments_of_their_own_units() -> None:
    layer, stepper = trained(torch.optim.AdamW, granularity=2)
    upcycle(layer, stepper)
    for (dense, stack), axis in zip(pairs(layer), layer.experts.axes.values(), strict=True):
        moment = stepper.state[dense]["exp_avg"]
        for expert, carried in enumerate(stepper.state[stack]["exp_avg"]):
            assert carried.equal(slice_units(moment, axis, 16, expert % 2, 2))


def test_only_what_the_optimizer_keeps_for_a_stack_is_carried() -> None:
    """Two optimizers in one may treat matrices and stacks of them otherwise."""
    layer, stepper = trained(torch.optim.AdamW)
    for dense, stack in pairs(layer):
        stepper.state[stack] = {"momentum_buffer": torch.zeros_like(stack)}
        stepper.state[dense]["momentum_buffer"] = torch.ones_like(dense)
    upcycle(layer, stepper)
    for _, stack in pairs(layer):
        assert stepper.state[stack].keys() == {"momentum_buffer"}
        assert stepper.state[stack]["momentum_buffer"].eq(1).all()


def test_without_upcycling_experts_are_summed_as_they_are() -> None:
    layer = MoE(experts=4, upcycle=False, shared=1, granularity=2, router=TopK(top_k=2)).create_layer(8, 16)
    x = torch.randn(1, 3, 8)
    assert layer.shared is not None
    alone = MoE(experts=4, upcycle=False, granularity=2).create_layer(8, 16)
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared")})
    torch.testing.assert_close(layer(x).output, alone(x).output + layer.shared[0](x))
