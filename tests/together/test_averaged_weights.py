"""Averaged weights are used by every command that runs a trained model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt.cli import main
from apt.cli.show import size
from apt.core.estimate import estimate
from apt.core.profile import load_profile
from apt.core.resolve import resolve_config
from apt.modeling.compose import ModelBuilder
from apt.modeling.parts import set_active
from apt.training.checkpoint import load_run
from apt.training.weights import list_weights, use_weights
from apt_align.average import Average
from apt_moe.upcycling import upcycle

PROFILE = """\
name: averaged
plugins: [align]
model:
  {{d_model: 16, num_heads: 2, num_layers: 1, d_ff: 24, max_seq_len: 32, dropout: 0.0, attention_dropout: 0.0, norm: rmsnorm,
   ffn: swiglu, attention: sdpa, align: {{provider: mean_teacher, decay: 0.99, weight: 0.0}}}}
training: {{max_steps: 30, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-1}}
data: {{source: files, path: "{text}"}}
evaluation: {{max_batches: 1, sample_tokens: 0}}
monitoring: {{plot: false}}
"""
EXPERTS = """\
name: growing
plugins: [moe]
model:
  {{d_model: 16, num_heads: 2, num_layers: 2, d_ff: 24, max_seq_len: 32, dropout: 0.0, attention_dropout: 0.0, norm: rmsnorm,
   attention: sdpa, ffn: {{provider: moe, experts: 4, expert: swiglu, router: {{provider: topk_default, top_k: 2}}{more}}}}}
training: {{max_steps: 4, batch_size: 2, warmup_steps: 0, learning_rate: 1.0e-1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    (folder / "profile.yaml").write_text(PROFILE.format(text=text))
    assert main(["train", "-p", str(folder / "profile.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_export_writes_the_weights_that_are_asked_for(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    assert list_weights(loaded.folder) == ["trained", "ema"]
    trained = loaded.model.embedding.weight.detach().clone()
    use_weights(loaded.folder, loaded.model, "ema")
    averaged = loaded.model.embedding.weight.detach()
    assert not torch.equal(trained, averaged)
    for name, expected in (("trained", trained), ("ema", averaged)):
        assert main(["export", "hf", str(run), str(tmp_path / name), "--weights", name]) == 0
        written = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(written["model.embed_tokens.weight"], expected)
    assert main(["export", "hf", str(run), str(tmp_path / "other"), "--weights", "other"]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("more", ["", ", granularity: 2, shared: 1"], ids=["whole", "fine-grained and shared"])
def test_experts_that_grow_leave_the_averaged_model_as_it_was(tmp_path: Path, more: str) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(EXPERTS.format(more=more))
    model, tokens = ModelBuilder(load_profile(profile).config).build_model(), torch.randint(259, (2, 16))
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=3e-2), Average(0.9)

    def learn() -> None:
        optimizer.zero_grad()
        model(tokens).logits.logsumexp(-1).mean().backward()
        average.see_gradients(model)
        optimizer.step()
        average.update(model)

    set_active(model, "moe", False)
    for _ in range(4):
        learn()
    before = average(model, tokens).logits
    assert not torch.allclose(model(tokens).logits, before, atol=1e-2)
    set_active(model, "moe", True)
    for number, layer in enumerate(block.ffn for block in model.blocks):
        upcycle(layer, optimizer, number)
    torch.testing.assert_close(average(model, tokens).logits, before, atol=1e-5, rtol=1e-5)
    resumed = Average(0.9)
    resumed.load(average.save())
    torch.testing.assert_close(resumed(model, tokens).logits, before, atol=1e-5, rtol=1e-5)
    learn()
    assert not torch.allclose(average(model, tokens).logits, before, atol=1e-3)


def test_the_memory_that_check_foretells_holds_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_run(run)
    held = sum(each.nbytes for name, each in load_file(loaded.folder / "extra.safetensors").items() if ".ema." in name)
    cost = estimate(loaded.config, loaded.resolved)
    assert cost.averages == held > 0
    plain = loaded.config.model_copy(update={"align_name": "bistate_default", "options": {}, "plugins": ()})
    assert estimate(plain, resolve_config(plain)).averages == 0
    assert cost.training_memory == cost.weights + cost.gradients + cost.optimizer + held + cost.activations
    assert main(["check", str(run / "resolved.yaml")]) == 0
    assert f"averaged weights {size(held)}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("align", "parallel", "split"),
    [
        ("mean_teacher", "{parallel: fsdp}", "all"),
        ("mean_teacher", "{parallel: ddp, expert_parallel: 2}", "experts"),
        ("mean_teacher", "{parallel: ddp}", "nothing"),
        ("{provider: bistate_default, state: layer, layer: 0}", "{parallel: fsdp}", "nothing"),
    ],
)
def test_the_memory_that_check_foretells_holds_what_makes_room_for_them_where_weights_are_split(
    tmp_path: Path, align: str, parallel: str, split: str
) -> None:
    path = tmp_path / "split.yaml"
    path.write_text(EXPERTS.format(more=""))
    loaded = load_profile(path, sets=[f"hardware={parallel}", "plugins=[moe, align]", f"model.align={align}"])
    cost = estimate(loaded.config, resolve_config(loaded.config))
    expected = {"all": cost.weights, "experts": 4 * (2 * 4 * 3 * 16 * 24), "nothing": 0}[split]
    assert cost.set_aside == expected
    rest = cost.weights + cost.gradients + cost.optimizer + cost.averages + cost.activations
    assert cost.training_memory == rest + expected


def test_chat_and_generate_speak_with_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}")
    generated, replied = {}, {}
    for name in ("trained", "ema"):
        options = [str(run), "--weights", name, "--max-new-tokens", "24", "--temperature", "1"]
        assert main(["generate", *options, "--prompt", "def f1"]) == 0
        generated[name] = capsys.readouterr().out
        monkeypatch.setattr("sys.stdin", io.StringIO("def f1\n"))
        assert main(["chat", *options, "--template", str(template)]) == 0
        replied[name] = capsys.readouterr().out
    assert generated["trained"] != generated["ema"]
    assert replied["trained"] != replied["ema"]
    assert main(["chat", str(run), "--template", str(template), "--weights", "emma"]) == 2
    assert "holds no weights 'emma'; it has: trained, ema" in capsys.readouterr().err


def test_a_branch_with_experts_goes_on_with_the_average_of_the_trunk(run: Path, tmp_path: Path) -> None:
    changes = [
        "model.ffn={provider: moe, expert: swiglu, experts: 2, capacity: null}",
        "schedules.enable_moe_at_step=32",
    ]
    words = [word for each in (*changes, "training.max_steps=33") for word in ("--set", each)]
    # At a rate of 0 the weights stay, so that their average moves towards them and no further.
    words += ["--plugins", "align", "moe", "--set", "training.learning_rate=1e-12"]
    assert main(["branch", str(run), *words, "--out", str(tmp_path / "branch")]) == 0
    one, other = load_run(run), load_run(tmp_path / "branch")
    trained = one.model.state_dict()["blocks.0.ffn.up.weight"].clone()
    use_weights(one.folder, one.model, "ema")
    use_weights(other.folder, other.model, "ema")
    before = one.model.state_dict()["blocks.0.ffn.up.weight"]
    expected = trained + (before - trained) * (31 / 40) * (32 / 41) * (33 / 42)
    torch.testing.assert_close(other.model.state_dict()["blocks.0.ffn.dense.up.weight"], expected)
