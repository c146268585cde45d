"""Checks of aligners: neutral where there is nothing to align, a proper distance, and a teacher that stands still."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt.core.providers import AlignProvider
from apt.testing.kit import Subject, check, demand
from apt.testing.measure import demand_close, demand_finite, demand_gradients

D_MODEL = 24
METRICS = ("cosine", "l2", "kl")


def _parts(subject: Subject, *weights: float) -> tuple[AlignProvider, nn.Module, Tensor, Tensor]:
    assert isinstance(subject.provider, AlignProvider)
    one, two = torch.randn(2, 3, 11, D_MODEL, generator=torch.Generator().manual_seed(1))
    return subject.provider, subject.build(D_MODEL, *weights), one, two


@check("align")
def neutral_for_equal_states(subject: Subject) -> None:
    """Equal states stay as they are."""
    provider, aligner, one, _ = _parts(subject)
    aligned, loss = provider.compute_alignment(aligner, one, one.clone())
    demand_close(aligned, one, "aligning a state with itself moves it", 1e-6)
    demand(loss.dim() == 0 and loss.isfinite(), "the loss is not a finite scalar")


@check("align")
def neutral_without_weight(subject: Subject) -> None:
    """With alpha = beta = 0 the stable state stays as it is and the loss is 0."""
    provider, aligner, one, two = _parts(subject, 0.0, 0.0)
    aligned, loss = provider.compute_alignment(aligner, one, two)
    demand(torch.equal(aligned, one), "alpha = beta = 0 moves the stable state")
    demand(loss.item() == 0, f"alpha = beta = 0 gives a loss of {loss.item()}")


@check("align")
def distances(subject: Subject) -> None:
    """Each metric is 0 for equal states and above 0 for others."""
    provider, _, one, two = _parts(subject)
    for metric in METRICS:
        same = provider.compute_consistency_loss(one, one.clone(), metric)  # type: ignore[arg-type]
        apart = provider.compute_consistency_loss(one, two, metric)  # type: ignore[arg-type]
        demand(abs(same.item()) < 1e-5, f"{metric} of a state and itself is {same.item():.2e}")
        demand(apart.item() > 1e-3, f"{metric} of two random states is {apart.item():.2e}")


@check("align")
def a_mean_over_tokens(subject: Subject) -> None:
    """The distance does not grow with batch or length, and padding does not count."""
    provider, _, one, two = _parts(subject)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 7:] = False
    for metric in METRICS:
        right = provider.compute_consistency_loss(one, two, metric)  # type: ignore[arg-type]
        twice = provider.compute_consistency_loss(one.repeat(2, 1, 1), two.repeat(2, 1, 1), metric)  # type: ignore[arg-type]
        demand_close(twice, right, f"{metric} of a batch and of the batch twice")
        padded = provider.compute_consistency_loss(one, two, metric, mask)  # type: ignore[arg-type]
        alone = provider.compute_consistency_loss(one[:, :7], two[:, :7], metric)  # type: ignore[arg-type]
        demand_close(padded, alone, f"{metric} with padding and without")
    aligner = subject.build(D_MODEL)
    loss = provider.compute_alignment(aligner, one, two, mask)[1]
    demand_close(
        loss, provider.compute_alignment(aligner, one[:, :7], two[:, :7])[1], "the loss with padding and without"
    )


@check("align")
def finite(subject: Subject) -> None:
    """Zero states and large ones give finite losses and gradients."""
    provider, aligner, one, two = _parts(subject)
    for scale in (0.0, 1e4):
        a, b = (scale * one).requires_grad_(), (scale * two).requires_grad_()
        losses = {metric: provider.compute_consistency_loss(a, b, metric) for metric in METRICS}  # type: ignore[arg-type]
        aligned, losses["its loss"] = provider.compute_alignment(aligner, a, b)
        demand(aligned.isfinite().all(), f"what becomes of states times {scale:g} is not finite")
        for name, loss in losses.items():
            demand(loss.isfinite(), f"{name} of states times {scale:g} is {loss.item()}")
            if loss.requires_grad:
                what = f"the gradient of {name} of states times {scale:g}"
                demand_finite(loss, (a, b, *aligner.parameters()), what)


@check("align")
def learns(subject: Subject) -> None:
    """The loss of different states is above 0, and its gradient reaches a state and every parameter of the aligner."""
    provider, aligner, one, two = _parts(subject)
    one.requires_grad_()
    two.requires_grad_()
    _, loss = provider.compute_alignment(aligner.train(), one, two)
    demand(loss.item() > 1e-3, f"the loss of two random states is {loss.item():.2e}; a distance is above 0")
    demand(loss.requires_grad, "the loss is detached: it cannot draw anything together")
    torch.autograd.backward(loss)
    reached = [each for each in (one, two) if each.grad is not None and bool(each.grad.any())]
    demand(reached, "neither state gets a gradient")
    demand_gradients(aligner)


@check("align")
def state_dict(subject: Subject) -> None:
    """A state dict carries everything from one aligner to another."""
    provider, _, one, two = _parts(subject)
    first, other = (subject.build(D_MODEL, seed=seed).eval() for seed in (0, 1))
    other.load_state_dict(first.state_dict(), strict=True)
    seen, again = (provider.compute_alignment(each, one, two) for each in (first, other))
    same = torch.equal(seen[0], again[0]) and torch.equal(seen[1], again[1])
    demand(same, "a loaded aligner computes something else: some state is no parameter and no buffer")


@check("align")
def the_teacher_stands_still(subject: Subject) -> None:
    """With beta = 0 the loss teaches the state to align and leaves the stable one alone, where it says it can."""
    provider, aligner, one, two = _parts(subject, 1.0, 0.0)
    if not provider.supports_asymmetric_alignment():
        forth, back = (provider.compute_alignment(aligner, *pair)[1] for pair in ((one, two), (two, one)))
        demand_close(
            forth, back, "it says that both directions weigh the same, and swapping the states changes the loss"
        )
        return
    one.requires_grad_()
    two.requires_grad_()
    _, loss = provider.compute_alignment(aligner, one, two)
    teacher, student = torch.autograd.grad(loss, (one, two), allow_unused=True)
    demand(teacher is None or not teacher.any(), "the stable state gets a gradient, so both can meet in a constant")
    demand(student is not None and student.any(), "the state to align gets no gradient")


@check("align")
def passes(subject: Subject) -> None:
    """What it costs is no less than nothing, and no backward pass comes without its forward pass."""
    assert isinstance(subject.provider, AlignProvider)
    forward, backward = subject.provider.get_extra_passes()
    demand(0 <= backward <= forward, f"get_extra_passes says {forward} forward and {backward} backward passes")
    demand(
        subject.provider.get_step_cost() >= 1, f"a step with it costs {subject.provider.get_step_cost()} of one without"
    )


@check("align")
def warm_up(subject: Subject) -> None:
    """get_interpolation_weight is 0 before the warm-up, then rises to 1."""
    assert isinstance(subject.provider, AlignProvider)
    course = [subject.provider.get_interpolation_weight(epoch, 20, 5) for epoch in range(21)]
    demand(course[:5] == [0.0] * 5, f"before the warm-up it is {course[:5]}")
    demand(course == sorted(course) and course[-1] == 1.0, f"it does not rise to 1: {course}")


@check("align")
def parameter_count(subject: Subject) -> None:
    """get_parameter_count is exact."""
    provider, aligner, _, _ = _parts(subject)
    said, counted = provider.get_parameter_count(D_MODEL), sum(each.numel() for each in aligner.parameters())
    demand(said == counted, f"the provider says {said}, the aligner has {counted}")
