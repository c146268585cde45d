"""How far two states of the same tokens are apart: one number a token, and the mean over the tokens that count.

The first argument is the teacher, the second the student. Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

MAX_NEGATIVES = 1024
"""Tokens of the batch that `nce` compares with, evenly spread; more would make a matrix of tokens by tokens."""


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cos(teacher, student), [..., features] -> [...]; between 0 and 2."""
    return 1 - functional.cosine_similarity(teacher.float(), student.float(), dim=-1)


def l2(teacher: Tensor, student: Tensor) -> Tensor:
    """The squared distance of the normalised states, [..., features] -> [...].

    It is 2 (1 - cos). Without the normalisation, shrinking both states would be rewarded.
    """
    difference = functional.normalize(teacher.float(), dim=-1) - functional.normalize(student.float(), dim=-1)
    return difference.square().sum(-1)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits, [..., vocab] -> [...].

    The factor keeps the gradient's size independent of T (Hinton et al. 2015, arXiv:1503.02531).
    """
    target = (teacher.float() / temperature).log_softmax(-1)
    log_student = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(log_student, target, reduction="none", log_target=True).sum(-1)


def nce(teacher: Tensor, student: Tensor, temperature: float = 0.15, counted: Tensor | None = None) -> Tensor:
    """-log softmax of cos(student_i, teacher_i) / T among cos(student_i, teacher_j) / T, [..., features] -> [...].

    The j are the batch's other tokens where `counted` [...] is True, at most `MAX_NEGATIVES`, evenly spread. It is
    not 0 for equal states, and a constant state does not minimise it (van den Oord et al. 2018, arXiv:1807.03748).
    """
    targets = functional.normalize(teacher.float(), dim=-1).flatten(0, -2)
    queries = functional.normalize(student.float(), dim=-1).flatten(0, -2)
    tokens = torch.arange(len(targets), device=targets.device)
    others = tokens[:: -(-len(tokens) // MAX_NEGATIVES)]
    own = (queries * targets).sum(-1, keepdim=True) / temperature
    with unrounded(queries):
        scores = queries @ targets[others].t() / temperature
    excluded = others == tokens.unsqueeze(1)
    if counted is not None:
        excluded = excluded | ~counted.flatten()[others]
    scores = torch.cat([own, scores.masked_fill(excluded, float("-inf"))], dim=-1)
    return -scores.log_softmax(-1)[:, 0].view(teacher.shape[:-1])


def unrounded(states: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast rounds no product: cosines over a temperature are worth more bits than bfloat16 has."""
    device = states.device.type
    return torch.autocast(device, enabled=False) if device != "meta" else nullcontext()


def mean(distances: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of [batch, seq] over the tokens where `mask` is True (all of them where there is none)."""
    if mask is None:
        return distances.mean()
    return (distances * mask).sum() / mask.sum().clamp(min=1)


def cka(one: Tensor, two: Tensor, *, debiased: bool = True) -> Tensor:
    """Linear centred kernel alignment of two sets of states of the same tokens, [tokens, features] each: a scalar.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T and L = Y Y^T; 1 for states that differ by a rotation and a
    scale, whatever their widths (Kornblith et al. 2019, arXiv:1905.00414, eq. 3). With few tokens the plain estimate is near 1
    for anything; the debiased one takes the unbiased estimate of HSIC (Song et al. 2012, JMLR 13, eq. 5), is near 0 for
    unrelated states, and may fall below it. A measure, not a loss: states that say nothing have none (nan). Raises
    `ValueError` for fewer than four tokens.
    """
    if len(one) < 4:
        raise ValueError(f"cka compares at least 4 tokens, not {len(one)}")
    first, second = (_gram(each.double(), debiased) for each in (one, two))
    hsic = _unbiased_hsic if debiased else _hsic
    return (hsic(first, second) / (hsic(first, first) * hsic(second, second)).sqrt()).float()


def _gram(states: Tensor, debiased: bool) -> Tensor:
    states = states - states.mean(0)
    gram = states @ states.t()
    return gram - gram.diag().diag() if debiased else gram


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum()


def _unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Of Gram matrices whose diagonal is 0."""
    tokens = len(first)
    sums = first.sum() * second.sum() / ((tokens - 1) * (tokens - 2))
    rows = first.sum(0) @ second.sum(0) * 2 / (tokens - 2)
    return ((first * second).sum() + sums - rows) / (tokens * (tokens - 3))
