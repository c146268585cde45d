from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from apt.core import registry
from apt.core.providers import FFNProvider
from apt.errors import OptionsError
from apt.layers import Part
from apt_moe.experts import Experts


class Odd(nn.Module):
    """A third party's layer: it uses its parameters in ways that a grouped product does not know."""

    def __init__(self, d_model: int, d_ff: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model, bias=False)
        self.norm = nn.LayerNorm(d_model)
        self.gain = nn.Parameter(torch.rand(d_ff))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor | Part:
        if self.way == "fused":
            return functional.linear(functional.relu(functional.linear(x, self.up.weight)), self.down.weight)
        if self.way == "product":
            return functional.relu(x @ self.up.weight.T) @ self.down.weight.T
        if self.way == "stacked":
            return functional.relu(functional.linear(x, torch.cat([self.up.weight]))) @ self.down.weight.T
        if self.way == "losses":
            return Part(self.down(self.up(x)), {"own": x.sum()})
        return self.down(self.gain * self.up(self.norm(x)))


class OddProvider(FFNProvider):
    way: Literal["fused", "product", "stacked", "gain", "losses"]

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Odd:
        return Odd(d_model, d_ff, self.way)

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        return 2 * d_model * d_ff + 2 * d_ff + 2 * d_model

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        return 4 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        return 4 * batch_size * seq_len * (2 * d_model + 3 * d_ff)


def provider(name: str) -> FFNProvider:
    made = registry.get("ffn", name) if name in ("default", "swiglu") else OddProvider(way=name)
    assert isinstance(made, FFNProvider)
    return made


@pytest.mark.parametrize("name", ["default", "swiglu", "fused"])
def test_layers_of_linear_maps_alone_are_run_in_grouped_products(name: str) -> None:
    assert Experts(provider(name), 3, 8, 16, 0.0, "gelu").grouped


@pytest.mark.parametrize("name", ["gain", "product", "stacked"])
def test_layers_that_use_their_parameters_otherwise_are_run_one_by_one(name: str) -> None:
    assert not Experts(provider(name), 3, 8, 16, 0.0, "gelu").grouped


def test_every_expert_starts_from_numbers_of_its_own() -> None:
    experts = Experts(provider("default"), 3, 8, 16, 0.0, "gelu")
    for stack in experts.layer.parameters():
        assert stack.shape[0] == 3
        if stack.std() > 0:
            assert not stack[0].equal(stack[1])
            assert not stack[1].equal(stack[2])


@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0, 5), (1, 0, 0), (2, 3, 4)])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 9)])
@pytest.mark.parametrize("name", ["default", "swiglu", "fused", "gain", "product", "stacked"])
def test_rows_and_gradients_are_those_of_each_expert_alone(
    name: str, sizes: tuple[int, int], counts: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    d_model, d_ff = sizes
    made = provider(name)
    experts = Experts(made, len(counts), d_model, d_ff, 0.0, "gelu")
    rows = torch.randn(sum(counts) + 2, d_model, requires_grad=True)  # the last two belong to nobody
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    offsets = torch.tensor(counts).cumsum(0).int()
    owned = sum(counts)
    ours = experts(rows, offsets, torch.cat([owners, owners.new_zeros(2)]))
    assert ours.isfinite().all()

    single = made.create_layer(d_model, d_ff)
    assert isinstance(single, nn.Module)
    alone = []
    for row, owner in zip(rows, owners, strict=False):
        weights = {name: stack[owner] for name, stack in experts.layer.named_parameters()}
        alone.append(torch.func.functional_call(single, weights, (row.view(1, 1, -1),)).view(-1))
    theirs = torch.stack(alone)
    torch.testing.assert_close(ours[:owned], theirs)

    probe = torch.randn(owned, d_model)
    learnt = [rows, *experts.parameters()]
    mine = torch.autograd.grad((ours[:owned] * probe).sum(), learnt, allow_unused=True)
    its = torch.autograd.grad((theirs * probe).sum(), learnt, allow_unused=True)
    for own, other in zip(mine, its, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("name", "backend"), [("gain", "loop"), ("swiglu", "loop"), ("swiglu", "bmm"), ("swiglu", "grouped_mm")]
)
def test_where_no_row_comes_every_gradient_is_there_and_zero(
    name: str, backend: Literal["loop", "bmm", "grouped_mm"]
) -> None:
    experts = Experts(provider(name), 3, 8, 16, 0.0, "gelu")
    rows = torch.zeros(0, 8, requires_grad=True)
    output = experts(rows, torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.long), backend)
    assert output.shape == (0, 8)
    output.sum().backward()
    for tensor in (rows, *experts.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_an_expert_with_losses_of_its_own_is_refused() -> None:
    experts = Experts(provider("losses"), 2, 8, 16, 0.0, "gelu")
    with pytest.raises(OptionsError, match="an expert cannot bring losses of its own"):
        experts(torch.randn(2, 8), torch.tensor([1, 2]).int(), torch.tensor([0, 1]))


def test_dropout_follows_the_mode() -> None:
    experts = Experts(provider("default"), 2, 8, 64, 0.5, "gelu")
    arguments = torch.randn(6, 8), torch.tensor([3, 6]).int(), torch.tensor([0, 0, 0, 1, 1, 1])
    assert not experts(*arguments).equal(experts(*arguments))
    experts.eval()
    assert experts(*arguments).equal(experts(*arguments))


class Tied(nn.Module):
    """Its gate is its first matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.gate.weight = self.up.weight

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.down(self.up(x).relu() * self.gate(x))


class TiedProvider(OddProvider):
    way: Literal["tied"] = "tied"  # type: ignore[assignment]

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Tied:
        return Tied(d_model, d_ff)


def test_matrices_that_are_one_stay_one() -> None:
    experts = Experts(TiedProvider(), 3, 8, 16, 0.0, "gelu")
    assert experts.layer.gate.weight is experts.layer.up.weight
    assert experts.grouped
    rows, offsets = torch.randn(6, 8), torch.tensor([2, 5, 6], dtype=torch.int32)
    owners = torch.tensor([0, 0, 1, 1, 1, 2])
    up, down = experts.layer.up.weight[owners], experts.layer.down.weight[owners]
    hidden = torch.einsum("rud,rd->ru", up, rows)
    expected = torch.einsum("rdu,ru->rd", down, hidden.relu() * hidden)
    torch.testing.assert_close(experts(rows, offsets, owners), expected)
    torch.testing.assert_close(experts.every(rows, torch.eye(3)[owners]), expected)
    torch.testing.assert_close(experts.few(rows, owners[:, None], torch.ones(6, 1)).detach(), expected)
    torch.testing.assert_close(experts._one_by_one(rows, offsets), expected)


class FrozenProvider(OddProvider):
    """Its first matrix is random and stays so."""

    way: Literal["fused", "gain"]

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> Odd:
        layer = Odd(d_model, d_ff, self.way)
        layer.up.weight.requires_grad_(False)
        return layer


@pytest.mark.parametrize(
    ("way", "backend"), [("fused", "loop"), ("fused", "bmm"), ("fused", "grouped_mm"), ("gain", "loop")]
)
def test_what_a_layer_does_not_train_its_experts_do_not(
    way: Literal["fused", "gain"], backend: Literal["loop", "bmm", "grouped_mm"]
) -> None:
    experts = Experts(FrozenProvider(way=way), 3, 8, 16, 0.0, "gelu")
    assert [name for name, each in experts.named_parameters() if not each.requires_grad] == ["layer.up.weight"]
    rows, offsets = torch.randn(6, 8, requires_grad=True), torch.tensor([2, 5, 6], dtype=torch.int32)
    owners = torch.tensor([0, 0, 1, 1, 1, 2])
    learnt = [rows, experts.layer.down.weight]
    expected = torch.autograd.grad(experts.every(rows, torch.eye(3)[owners]).square().sum(), learnt)
    seen = torch.autograd.grad(experts(rows, offsets, owners, backend).square().sum(), learnt)
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other)
