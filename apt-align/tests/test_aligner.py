import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apt_align.provider import BiState

seeds = st.integers(0, 999)
METRICS = ["cosine", "l2", "kl", "nce"]


@pytest.mark.parametrize("metric", METRICS)
@given(seed=seeds)
def test_each_half_has_a_detached_teacher(metric: str, seed: int) -> None:
    torch.manual_seed(seed)
    stable, align = torch.randn(2, 2, 5, 8).requires_grad_().unbind()
    for alpha, beta, learns in ((1.0, 0.0, align), (0.0, 1.0, stable)):
        aligner = BiState(alpha=alpha, beta=beta, metric=metric).create_aligner(8)
        one, two = torch.autograd.grad(aligner(stable, align), (stable, align), allow_unused=True)
        taught, teacher = (two, one) if learns is align else (one, two)
        assert taught.abs().sum() > 0
        assert teacher is None


@given(seeds, st.floats(0.1, 1), st.floats(0.1, 1))
def test_the_halves_are_weighed_by_alpha_and_beta(seed: int, alpha: float, beta: float) -> None:
    torch.manual_seed(seed)
    stable, align = torch.randn(2, 2, 5, 8)
    provider = BiState(alpha=alpha, beta=beta)
    forward = provider.compute_consistency_loss(stable, align, "kl")
    backward = provider.compute_consistency_loss(align, stable, "kl")
    expected = (alpha * forward + beta * backward) / (alpha + beta)
    torch.testing.assert_close(provider.create_aligner(8)(stable, align), expected)


@given(seeds)
def test_with_alpha_and_beta_0_there_is_no_loss_and_nothing_is_mixed(seed: int) -> None:
    torch.manual_seed(seed)
    stable, align = torch.randn(2, 2, 5, 8)
    provider = BiState(alpha=0, beta=0)
    aligned, loss = provider.compute_alignment(provider.create_aligner(8), stable, align)
    assert aligned.equal(stable)
    assert loss == 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.35, 0.0), (0.0, 0.2), (0.35, 0.2)])
def test_states_that_agree_are_not_changed_by_mixing_nor_by_either_strength_alone(alpha: float, beta: float) -> None:
    stable, other = torch.randn(2, 2, 5, 8)
    aligner = BiState(rank_ratio=0.5).create_aligner(8, alpha, beta)
    assert aligner.mix(stable, stable).equal(stable)
    assert aligner.mix(stable, other).equal(stable) == (alpha * beta == 0)


def test_mixing_moves_towards_the_other_state_within_the_subspace() -> None:
    stable, align = torch.randn(2, 1, 3, 8)
    aligner = BiState(rank_ratio=1.0).create_aligner(8, 0.5, 0.5)
    torch.testing.assert_close(aligner.mix(stable, align), stable + 0.25 * (align - stable))
    narrow = BiState(rank_ratio=0.25).create_aligner(8, 1.0, 1.0)
    assert torch.linalg.matrix_rank((narrow.mix(stable, align) - stable)[0]) == 2
    torch.testing.assert_close(narrow.down @ narrow.down.t(), torch.eye(2))


@given(seeds, st.sampled_from(METRICS))
def test_padding_does_not_count(seed: int, metric: str) -> None:
    torch.manual_seed(seed)
    stable, align = torch.randn(2, 2, 6, 8)
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [3]])
    aligner = BiState(metric=metric).create_aligner(8)
    loss = aligner(stable, align, mask=mask)
    moved = torch.where(mask.unsqueeze(-1), align, 1e3)
    torch.testing.assert_close(aligner(stable, moved, mask=mask), loss)


@pytest.mark.parametrize("metric", ["cosine", "l2", "nce"])
def test_an_earlier_layer_learns_to_predict_a_later_one(metric: str) -> None:
    torch.manual_seed(0)
    earlier = torch.randn(4, 9, 8)
    later = earlier @ torch.randn(8, 8)
    aligner = BiState(state="layer", metric=metric, beta=0.0).create_aligner(8)
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = aligner(later, earlier)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("state", ["dropout", "ema", "layer"])
def test_all_that_an_aligner_learns_gets_a_gradient(state: str) -> None:
    aligner = BiState(state=state).create_aligner(8)
    states = torch.randn(2, 2, 5, 8).requires_grad_()
    aligner(*states).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in aligner.parameters())
    assert (sum(1 for _ in aligner.parameters()) > 0) == (state == "layer")


def test_two_students_of_each_other_do_not_collapse() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 16)
    layer = nn.Linear(16, 8)
    aligner = BiState(metric="nce").create_aligner(8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        one, two = (layer(nn.functional.dropout(inputs, 0.1)).unsqueeze(0) for _ in range(2))
        aligner(one, two).backward()
        optimizer.step()
    assert (nn.functional.normalize(layer(inputs), dim=-1).std(0) > 0.1).all()


def test_it_is_saved_and_loaded_whole_and_built_on_the_meta_device() -> None:
    aligner = BiState().create_aligner(16)
    file = io.BytesIO()
    torch.save(aligner.state_dict(), file)
    file.seek(0)
    other = BiState().create_aligner(16)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    stable, align = torch.randn(2, 1, 3, 16)
    assert other.mix(stable, align).equal(aligner.mix(stable, align))
    with torch.device("meta"):
        assert {b.device.type for b in BiState(state="layer").create_aligner(16).buffers()} == {"meta"}


def test_it_is_idle_while_it_is_off_or_weighs_nothing() -> None:
    aligner = BiState(state="layer").create_aligner(8)
    assert aligner.idle() == []
    aligner.weight.zero_()
    assert aligner.idle() == [aligner]
    aligner.weight.fill_(1.0)
    aligner.active = False
    assert aligner.idle() == [aligner]
    neutral = BiState(alpha=0, beta=0).create_aligner(8)
    assert neutral.idle() == [neutral]
