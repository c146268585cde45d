from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.core.profile import load_profile
from apt.layers import Part
from apt.training.record import read_metrics
from apt.training.trainer import Trainer
from apt_attention_tva.compensator import Compensator
from apt_attention_tva.functional import lost_energy
from apt_attention_tva.provider import TVA

from .conftest import D_MODEL, states

PROFILE = """
name: compensated
model:
  {{d_model: 16, num_heads: 2, num_layers: 1, d_ff: 16, max_seq_len: 16,
    attention: {{provider: tva_default, s: 1, tau: {tau}, r: 2}}}}
training: {{max_steps: 4, max_epochs: 1, batch_size: 4, warmup_steps: 1, learning_rate: 1.0e-3}}
data: {{source: files, path: "{texts}"}}
evaluation: {{max_batches: 2, eval_every: 2, sample_tokens: 0}}
monitoring: {{plot: false}}
hardware: {{threads: 1}}
"""


def make(normals: int = 2, tau: float = 0.18, rank: int = 6) -> Compensator:
    torch.manual_seed(0)
    made = Compensator(D_MODEL, rank, normals, tau, subspace_loss=0.1).double()
    torch.nn.init.normal_(made.write)
    return made


def test_it_is_its_formula() -> None:
    made, h = make(tau=0.75), states(2, 9)
    expected = torch.zeros_like(h)
    with torch.no_grad():
        over = (h - h @ made.down.T @ made.down).square().sum(-1) / h.square().sum(-1) > 0.75
        amount = 0.5 * torch.sigmoid(made.gate(torch.nn.functional.layer_norm(h, (D_MODEL,))))
        for j in range(2):
            expected += (amount[..., j] * (h @ made.read[j]) * over).unsqueeze(-1) * made.write[j]
    correction, losses, metrics = made(h)
    assert 0 < over.sum() < over.numel()
    torch.testing.assert_close(correction, expected)
    assert metrics["tva_compensated_share"].item() == pytest.approx(over.double().mean().item())
    assert losses["tva_subspace"].item() == pytest.approx(0.1 * lost_energy(h, made.down).mean().item())


def test_a_fresh_one_changes_nothing() -> None:
    made = Compensator(D_MODEL, 6, 2, 0.0, 0.1)
    assert not made(torch.randn(2, 9, D_MODEL))[0].any()


@pytest.mark.parametrize(("tau", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_threshold_decides_who_is_corrected(tau: float, share: float) -> None:
    correction, _, metrics = make(tau=tau)(states(2, 9))
    assert metrics["tva_compensated_share"].item() == share
    assert bool(correction.any()) == bool(share)


def test_its_loss_finds_the_principal_subspace_and_does_not_pull_at_the_states() -> None:
    torch.manual_seed(0)
    h = (torch.randn(400, 4) @ torch.randn(4, D_MODEL) + 0.1 * torch.randn(400, D_MODEL)).unsqueeze(0).requires_grad_()
    made = Compensator(D_MODEL, 4, 1, 0.18, subspace_loss=1.0)
    assert made(h)[2]["tva_compensated_share"] > 0.9
    optimizer = torch.optim.Adam([made.down], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        made(h)[1]["tva_subspace"].backward()
        optimizer.step()
    assert h.grad is None or not h.grad.any()
    centred = h.detach()[0]
    best = torch.linalg.svd(centred, full_matrices=False)[2][:4]
    assert lost_energy(centred, made.down).mean() < 1.1 * lost_energy(centred, best).mean()
    torch.testing.assert_close(made.down @ made.down.T, torch.eye(4), atol=0.05, rtol=0)
    assert made(h)[2]["tva_compensated_share"] < 0.1


def test_the_layer_reports_loss_and_share_as_values_on_the_device() -> None:
    layer = TVA(s=1).create_layer(D_MODEL, 3)
    result = layer(torch.randn(1, 5, D_MODEL))
    assert isinstance(result, Part)
    assert result.losses["tva_subspace"].requires_grad
    assert not result.metrics["tva_compensated_share"].requires_grad
    with torch.device("meta"):
        onmeta = TVA(s=1).create_layer(D_MODEL, 3)
        onmeta(torch.randn(1, 5, D_MODEL))  # fails at any .item()


@pytest.mark.parametrize(("tau", "warns"), [(0.0, True), (1.0, True), (0.5, False)])
def test_training_warns_once_of_a_share_that_says_nothing(tmp_path: Path, tau: float, warns: bool) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"the cat sat on mat {number} " * 20)
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE.format(tau=tau, texts=texts / "*.txt"))
    said = io.StringIO()
    console = Console(file=said, width=400)
    result = Trainer(load_profile(profile).config, tmp_path / "run", console=console).fit()
    shares = [event["tva_compensated_share"] for event in read_metrics(result.folder) if event["event"] == "evaluation"]
    assert len(shares) == 2
    assert said.getvalue().count("warning: model.attention: tva_compensated_share is") == warns
    assert warns or all(0.01 <= float(str(share)) <= 0.9 for share in shares)
