import pytest
import torch
from torch import Tensor, nn

from apt_moe.layer import MixtureOfExperts
from apt_moe.provider import MoE
from apt_moe.upcycling import upcycle

OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


def trained(optimizer: type[torch.optim.Optimizer]) -> tuple[MixtureOfExperts, torch.optim.Optimizer]:
    """A mixture that is off and whose dense layer has taken three steps."""
    torch.manual_seed(0)
    layer = MoE(experts=4).create_layer(8, 16)
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
