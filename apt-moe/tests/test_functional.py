import os
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from apt_moe import functional
from apt_moe.provider import TopK


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_a_uniform_router_with_a_balanced_load_has_balance_loss_1(experts: int, top_k: int, rounds: int) -> None:
    top_k = min(top_k, experts)
    sent = torch.zeros(experts * rounds, experts)
    for token in range(len(sent)):
        sent[token, [(token + choice) % experts for choice in range(top_k)]] = 1
    loss = functional.load_balance_loss(torch.zeros(len(sent), experts), sent)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_a_collapsed_router_has_balance_loss_experts_over_k() -> None:
    logits = torch.tensor([20.0, 20.0, -20.0, -20.0, -20.0, -20.0]).repeat(10, 1)
    sent = torch.tensor([1.0, 1.0, 0, 0, 0, 0]).repeat(10, 1)
    torch.testing.assert_close(functional.load_balance_loss(logits, sent), torch.tensor(6 / 2))


def test_a_step_down_the_balance_loss_lowers_the_highest_load() -> None:
    torch.manual_seed(0)
    router = TopK(balance_loss=1.0, z_loss=0.0)
    layer = router.create_router(8, 4)
    inputs = torch.randn(1, 200, 8) + layer.weight[0].detach().sign()

    def highest_load() -> float:
        return torch.bincount(router.route(layer, inputs, False)[0].flatten(), minlength=4).max().item()

    before = highest_load()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        router.route(layer, inputs)[2]["balance_loss"].backward()
        optimizer.step()
    assert highest_load() < 0.6 * before


def test_the_share_that_is_sent_has_no_gradient() -> None:
    sent = torch.rand(5, 3, requires_grad=True)
    logits = torch.randn(5, 3, requires_grad=True)
    functional.load_balance_loss(logits, sent).backward()
    assert sent.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@given(st.integers(0, 7))
def test_padding_does_not_change_the_losses(padding: int) -> None:
    torch.manual_seed(padding)
    logits = torch.randn(6 + padding, 4)
    counted = torch.arange(6 + padding) < 6
    sent = torch.zeros_like(logits).scatter_(1, logits.topk(2).indices, 1.0) * counted.unsqueeze(1)
    alone = functional.load_balance_loss(logits[:6], sent[:6])
    torch.testing.assert_close(functional.load_balance_loss(logits, sent), alone)
    torch.testing.assert_close(functional.z_loss(logits, counted), functional.z_loss(logits[:6]))
    torch.testing.assert_close(
        functional.entropy(logits.softmax(-1), counted), functional.entropy(logits[:6].softmax(-1))
    )


def test_the_z_loss_is_the_mean_of_the_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(functional.z_loss(logits), (log2**2 + (3 + log2) ** 2) / 2)


def test_the_entropy_of_a_uniform_router_is_log_experts() -> None:
    torch.testing.assert_close(functional.entropy(torch.full((3, 8), 1 / 8)), torch.tensor(8.0).log())


@given(
    batch=st.integers(1, 512),
    seq=st.integers(1, 8192),
    experts=st.integers(1, 256),
    top_k=st.integers(1, 8),
    factor=st.one_of(
        st.integers(1, 800).map(lambda hundredths: hundredths / 100),
        st.integers(1, 8_000_000).map(lambda millionths: millionths / 1_000_000),
    ),
)
@example(batch=1, seq=40, experts=4, top_k=2, factor=0.7)  # 0.69999999 in float32
@example(batch=32, seq=3125, experts=100, top_k=1, factor=0.999999)  # just below a whole number
def test_the_capacity_on_the_device_is_the_interface_s(
    batch: int, seq: int, experts: int, top_k: int, factor: float
) -> None:
    top_k = min(top_k, experts)
    limit = functional.capacity(batch * seq * top_k, experts, top_k, torch.tensor(factor))
    said = TopK().get_capacity(batch, seq, experts, top_k, factor)
    assert limit.item() == min(said, batch * seq * top_k)


def test_an_infinite_capacity_factor_is_no_limit() -> None:
    assert functional.capacity(100, 4, 2, torch.tensor(float("inf"))).item() == 100


RANK = """
import os, sys, torch
from apt_moe import functional
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
mine, found = slice(4 * rank, 4 * rank + 4), {}

def losses(padded, rows, logits):
    counted = torch.arange(8) < (5 if padded else 8)  # of the second rank one alone
    sent = functional.expert_mask(whole.topk(2).indices, 4, counted)
    logits = logits.clone().requires_grad_()
    z_loss = functional.z_loss(logits, counted[rows] if padded else None)
    loss = torch.stack((functional.load_balance_loss(logits, sent[rows]), z_loss))
    loss.sum().backward()
    return loss.detach(), logits.grad

torch.manual_seed(0)
whole = torch.randn(8, 4)
for padded in (False, True):
    total, grad = losses(padded, mine, whole[mine])
    both = [torch.empty_like(grad) for _ in range(2)]
    torch.distributed.all_gather(both, grad)
    torch.distributed.all_reduce(total)
    found[padded] = total / 2, torch.cat(both) / 2
torch.distributed.destroy_process_group()
for padded in (False, True):
    torch.testing.assert_close(found[padded], losses(padded, slice(8), whole))
"""


def test_two_ranks_of_half_a_batch_padded_or_not_have_the_losses_and_the_gradient_of_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "store")], env=os.environ | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]


@given(st.integers(0, 2**31 - 1), st.integers(1, 20), st.integers(1, 6), st.integers(1, 3))
def test_both_losses_in_one_are_the_two_with_their_gradients(seed: int, tokens: int, experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(tokens, experts, generator=generator)).requires_grad_()
    indices = logits.topk(min(top_k, experts)).indices
    together = functional._Losses.apply(logits, indices)  # which is for accelerators
    apart = functional.load_balance_loss(logits, functional.expert_mask(indices, experts)), functional.z_loss(logits)
    torch.testing.assert_close(together, apart)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)):
        grads = [
            torch.autograd.grad(weights[0] * a + weights[1] * b, logits, retain_graph=True)[0]
            for a, b in (together, apart)
        ]
        torch.testing.assert_close(*grads)
        firsts = [
            torch.autograd.grad(weights[0] * a + weights[1] * b, logits, create_graph=True)[0]
            for a, b in (together, apart)
        ]
        seconds = [torch.autograd.grad(first.square().sum(), logits, retain_graph=True)[0] for first in firsts]
        torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)
