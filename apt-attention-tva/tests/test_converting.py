"""Converting trained attention: exact where nothing is lost, near where little is, and a run of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.core.profile import load_profile
from apt.core.providers import HeadsProvider
from apt.core.registry import registry
from apt.errors import UserError
from apt.inference.generate import generate
from apt.layers.heads import Heads
from apt.runs import LoadedRun, load_run
from apt.training.trainer import Trainer
from apt_attention_tva.cli import main
from apt_attention_tva.components import score_projector, value_maps, watch
from apt_attention_tva.converting import KEPT, convert_layer, convert_run
from apt_attention_tva.provider import TVA
from apt_attention_tva.tva import NarrowAttention, TriVeinAttention

D_MODEL, HEADS, WIDTH = 32, 4, 8
PROFILE = """
name: small
model:
  {{d_model: 32, num_heads: 4, num_layers: 2, d_ff: 64, max_seq_len: 32, dropout: 0.0, attention_dropout: 0.0,
    attention: {attention}}}
training: {{max_steps: 30, max_epochs: 1, batch_size: 8, learning_rate: 1.0e-2, warmup_steps: 5}}
data: {{source: files, path: "{texts}"}}
evaluation: {{max_batches: 4, sample_tokens: 0}}
monitoring: {{plot: false}}
hardware: {{threads: 1}}
"""


def source(options: Mapping[str, object]) -> tuple[HeadsProvider, Heads]:
    """An sdpa layer in float64 whose every parameter has left its starting point."""
    provider = registry.get("attention", "sdpa", dict(options), fallback=False)
    assert isinstance(provider, HeadsProvider)
    torch.manual_seed(0)
    layer = provider.create_layer(D_MODEL, HEADS)
    assert isinstance(layer, Heads)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return provider, layer.double().eval()


def convert(layer: Heads, options: Mapping[str, object], rank: int, x: torch.Tensor) -> TriVeinAttention:
    """The layer at this rank, by the components of what it does with `x`."""
    with watch(layer) as moments:
        layer(x)
    kept = {name: options[name] for name in KEPT if name in options}
    provider = TVA.model_validate({**kept, "rank": rank, "per_head": True, "scale": "head", "project": "last"})
    made = provider.create_layer(D_MODEL, HEADS)
    assert isinstance(made, TriVeinAttention)
    convert_layer(layer, made.double().eval(), moments)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "window": 5, "qk_norm": True, "bias": "all"},
        {"num_kv_heads": 1, "head_width": 12, "rope_scaling": {"type": "ntk", "factor": 2}, "bias": "qkv"},
        {"positions": "none"},
    ],
)
def test_at_full_rank_nothing_changes(options: dict[str, object]) -> None:
    _, layer = source(options)
    x = torch.randn(2, 40, D_MODEL, dtype=torch.float64)
    width = layer.shape.width
    made = convert(layer, options, width, x)
    torch.testing.assert_close(made(x), layer(x))
    torch.testing.assert_close(made.fold()(x), layer(x))


def test_heads_that_live_in_few_dimensions_lose_nothing_at_that_rank() -> None:
    options = {"positions": "none", "num_kv_heads": 2}
    _, layer = source(options)
    low = torch.randn(2, 3, WIDTH, dtype=torch.float64)  # for each group its three dimensions
    of = [0, 0, 1, 1, 0, 1, 0, 1]  # the groups of queries, keys and values
    qkv = layer.get_submodule("qkv").get_parameter("weight")
    with torch.no_grad():
        for number, group in enumerate(of):
            rows = slice(number * WIDTH, (number + 1) * WIDTH)
            qkv[rows] = low[group].T @ torch.randn(3, D_MODEL, dtype=torch.float64)
    x = torch.randn(2, 40, D_MODEL, dtype=torch.float64)
    made = convert(layer, options, 3, x)
    torch.testing.assert_close(made(x), layer(x))


def test_the_more_rank_the_nearer_and_components_are_nearer_than_random_projectors() -> None:
    _, layer = source({"num_kv_heads": 2})
    # States with a few strong directions, as trained ones have.
    x = torch.randn(4, 64, D_MODEL, dtype=torch.float64) * torch.logspace(0, -2, D_MODEL, dtype=torch.float64)
    errors = []
    for rank in (2, 4, 6, 8):
        made = convert(layer, {"num_kv_heads": 2}, rank, x)
        errors.append((made(x) - layer(x)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    made = convert(layer, {"num_kv_heads": 2}, 4, x)
    with torch.no_grad():
        drawn = torch.linalg.qr(torch.randn(2, WIDTH, 4, dtype=torch.float64))[0].mT
        made.down.copy_(drawn)
        made.up.copy_(drawn.mT)
    assert (made(x) - layer(x)).norm().item() > 1.5 * errors[1]


def test_the_maps_of_values_are_the_best_of_their_rank() -> None:
    torch.manual_seed(0)
    v, outward = torch.randn(500, 6, dtype=torch.float64), torch.randn(1, 2, 9, 6, dtype=torch.float64)
    moments = (v.T @ v).unsqueeze(0)
    inner, outer, kept = value_maps(moments, outward, 3)
    weight = outward.flatten(0, 2)
    whole = v @ weight.T
    error = (whole - v @ inner[0].T @ outer[0].T @ weight.T).square().sum()
    best = torch.linalg.svdvals(whole)[3:].square().sum()
    torch.testing.assert_close(error, best)
    assert kept == pytest.approx(1 - (best / whole.square().sum()).item())


def test_the_projector_of_scores_is_orthonormal_and_weighs_queries_and_keys_alike() -> None:
    q = torch.diag(torch.tensor([1000.0, 500.0, 0.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    k = torch.diag(torch.tensor([0.0, 0.0, 4.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    down, kept = score_projector(q, k, 2)
    torch.testing.assert_close(down @ down.mT, torch.eye(2, dtype=torch.float64).unsqueeze(0))
    assert down[0].abs().argmax(1).tolist() == [2, 0]
    assert kept == pytest.approx((0.8 + 2 / 3) / 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with plain attention."""
    return train(tmp_path_factory.mktemp("run"), "{provider: sdpa, num_kv_heads: 2}")


def train(folder: Path, attention: str) -> Path:
    """A run of a few steps on texts of its own."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        words = [f"{(number * 7 + word * word) % 97} is a number" for word in range(80)]
        (texts / f"{number}.txt").write_text("\n".join(words))
    profile = folder / "profile.yaml"
    profile.write_text(PROFILE.format(attention=attention, texts=texts / "*.txt"))
    Trainer(load_profile(profile).config, folder / "run", console=Console(quiet=True)).fit()
    return folder / "run"


def test_a_converted_run_is_a_run_with_its_parent_recorded(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "narrow"
    assert main(["tva", str(trained), "--rank", "6", "--out", str(out), "--batches", "4"]) == 0
    said = capsys.readouterr().out
    assert "before" in said
    assert "cache:    64 numbers a token before, 48 after (75%)" in said
    run, parent = load_run(out), load_run(trained)
    assert run.config.attention_name == "tva_default"
    assert run.config.choice("attention").options["num_kv_heads"] == 2
    assert run.state.step == parent.state.step == 30
    record = json.loads((out / "record.json").read_text())["parent"]
    assert record["checkpoint"] == parent.folder.name
    assert record["changes"] == ["model.attention: sdpa -> tva_default, rank 6 by principal components"]
    card = (out / "README.md").read_text()
    assert f"| made from | {parent.folder} |" in card
    assert "loss.png" not in card
    told = [float(line.split()[1]) for line in said.splitlines() if line.split()[:1] in (["before"], ["after"])]
    assert told[1] < told[0] + 0.5
    others = {name for name in parent.model.state_dict() if ".attention." not in name}
    for name in others:
        assert torch.equal(run.model.state_dict()[name], parent.model.state_dict()[name])


def test_at_full_rank_the_run_scores_as_its_parent_and_writes_the_same(trained: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    made = load_run(convert_run(trained, WIDTH, tmp_path / "full", console=console))
    assert "change  +0.0000" in console.file.getvalue().replace("-0.0000", "+0.0000")  # type: ignore[attr-defined]
    texts = [write(run) for run in (made, load_run(trained))]
    assert texts[0] == texts[1]


def write(run: LoadedRun) -> str:
    return generate(run.model, run.tokenizer, "12 is", max_new_tokens=20, temperature=0).text


def test_generate_folds_by_itself_and_leaves_the_model_as_it_was(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_run(convert_run(trained, 4, tmp_path / "half", console=Console(quiet=True)))
    used: list[int] = []
    forward = NarrowAttention.forward

    def counted(self: NarrowAttention, x: torch.Tensor, **options: object) -> object:
        used.append(x.shape[1])
        return forward(self, x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(NarrowAttention, "forward", counted)
    assert write(made)
    assert len(used) >= 2 * 20
    assert all(isinstance(block.attention, TriVeinAttention) for block in made.model.blocks)


def test_a_branch_of_a_converted_run_wins_loss_back(trained: Path, tmp_path: Path) -> None:
    converted = convert_run(trained, 2, tmp_path / "narrow", console=Console(quiet=True))
    run = load_run(converted)
    (scored,) = [json.loads(line) for line in (tmp_path / "narrow" / "metrics.jsonl").read_text().splitlines()]
    longer = run.config.model_copy(update={"training": run.config.training.model_copy(update={"max_steps": 60})})
    quiet = Console(quiet=True)
    result = Trainer(longer, tmp_path / "branch", branch=converted, console=quiet).fit()
    assert result.validation.loss < scored["loss"]


@pytest.mark.parametrize(
    ("rank", "message"),
    [("9", "rank 9 exceeds the head width 8"), ("0", "model.attention.rank: 0 is not allowed")],
)
def test_a_rank_that_does_not_fit_is_refused(trained: Path, tmp_path: Path, rank: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["tva", str(trained), "--rank", rank, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_refused_in_words(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty; give another --out"):
        convert_run(trained, 4, trained)
    with pytest.raises(UserError, match="--batches 0"):
        convert_run(trained, 4, tmp_path / "out", batches=0)
    (tmp_path / "sinks").mkdir()
    sinks = train(tmp_path / "sinks", "{provider: sdpa, sinks: true}")
    with pytest.raises(UserError, match="tva_default has no sinks"):
        convert_run(sinks, 4, tmp_path / "out")
    converted = convert_run(trained, 4, tmp_path / "half", console=Console(quiet=True))
    with pytest.raises(
        UserError, match="its attention is tva_default; those that can be converted: sdpa, flex, flash_v2"
    ):
        convert_run(converted, 2, tmp_path / "out")
