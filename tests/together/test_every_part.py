"""Every provider that is trained, in every mode of training: over its switch, stopped and resumed, scored and written from."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from apt.core.profile import load_profile
from apt.core.registry import registry
from apt.inference.generate import generate
from apt.training.checkpoint import load_run
from apt.training.record import read_metrics
from apt.training.trainer import RunResult, Trainer

MOE = "model.ffn={provider: moe, experts: 4, router: %s}"
ALIGN = "model.align=%s"
PARTS: dict[tuple[str, str], dict[str, str]] = {
    ("attention", "sdpa"): {
        "": "model.attention=sdpa",
        "all": "model.attention={provider: sdpa, num_kv_heads: 1, window: 5, qk_norm: true, sinks: true, bias: all}",
    },
    ("attention", "tva_default"): {
        "": "model.attention={provider: tva_default, r: 2}",
        "all": "model.attention={provider: tva_default, r: 2, num_kv_heads: 1, window: 5, qk_norm: true, s: 2, tau: 0.05}",
    },
    ("attention", "autopoietic"): {"": "model.attention=autopoietic"},
    ("ffn", "default"): {"": MOE % "{provider: topk_default, top_k: 2}, expert: default"},
    ("ffn", "swiglu"): {"": MOE % "{provider: topk_default, top_k: 2}, expert: swiglu, shared: 1"},
    ("ffn", "moe"): {"": MOE % "{provider: topk_default, top_k: 2}, capacity: 1.0, granularity: 2"},
    **{
        ("router", name): {"": MOE % f"{{provider: {name}}}"}
        for name in ("topk_default", "noisy_topk", "switch", "sigmoid_bias", "hash", "random")
    },
    ("router", "expert_choice"): {"": MOE % "{provider: expert_choice, allow_noncausal: true}"},
    ("align", "bistate_default"): {
        **{state: ALIGN % f"{{provider: bistate_default, state: {state}}}" for state in ("dropout", "ema", "layer")},
        "evidence": ALIGN % "{provider: bistate_default, state: evidence}",
        "nce": ALIGN % "{provider: bistate_default, state: layer, metric: nce}",
    },
    ("align", "rdrop"): {"": ALIGN % "rdrop"},
    ("align", "mean_teacher"): {"": ALIGN % "mean_teacher"},
    ("tokenizer", "byte"): {"": "data.tokenizer=byte"},
    ("tokenizer", "char"): {"": "data.tokenizer=char"},
    ("tokenizer", "bpe"): {"": "data.tokenizer={provider: bpe, vocab_size: 512}"},
}
ON_A_GPU: dict[tuple[str, str], dict[str, str]] = {
    ("attention", "flex"): {
        "": "model.attention={provider: flex, head_width: 16}",
        "all": "model.attention={provider: flex, head_width: 16, num_kv_heads: 1, window: 5, qk_norm: true, bias: all}",
    },
}
"""Those that train there alone."""
ELSEWHERE = {
    ("attention", "flash_v2"): "needs flash-attn and a GPU",
    ("attention", "flex"): "trains on a GPU alone, where it is in the cases",
    ("tokenizer", "pretrained"): "needs a file; apt-core/tests/builtin/test_pretrained.py",
}
MODES = {
    "as it is": (),
    "bf16": ("training.precision=bf16", "training.accumulate=2", "training.recompute=true"),
    "compiled": ("training.compile=true",),
    "muon": ("training.optimizer=muon", "training.accumulate=2"),
    "pairs": ("model.architecture=encoder_decoder",),
}
WHERE = {
    "compiled": ("attention", "ffn", "router"),
    "muon": ("attention", "ffn"),
    "pairs": ("attention", "ffn", "router"),
}
"""The kinds of parts for which a mode is one of its own; the others, all of them."""
INDUCTOR = (
    ("attention", "sdpa", ""),
    ("attention", "tva_default", ""),
    ("ffn", "swiglu", ""),
    ("attention", "flex", ""),
)
"""What is compiled by inductor too; all else by a compiler that does nothing, since each takes a minute."""
GPU = torch.cuda.is_available()
"""Whether there is one, and it was asked for: `pytest tests/gpu tests/together/test_every_part.py -k cuda`."""
CASES = [
    pytest.param(
        sets, mode, device, id=" ".join(filter(None, (kind, name, variant))) + f", {mode}, {device}", marks=marks
    )
    for device, parts in (("cpu", PARTS), *([("cuda", PARTS | ON_A_GPU)] if GPU else []))
    for (kind, name), variants in parts.items()
    for variant, sets in variants.items()
    for mode in (*MODES, *(["inductor"] if (kind, name, variant) in INDUCTOR else []))
    if kind in WHERE.get(mode, (kind,))
    for quick in (device == "cuda" or (mode == "as it is" and variant in ("", "dropout")),)
    for marks in ([] if quick else [pytest.mark.thorough],)
]

PROFILE = """\
name: part
plugins: [{plugins}]
model:
  {{d_model: 16, num_heads: 2, d_ff: 32, max_seq_len: 16, dropout: 0.1, attention_dropout: 0.0,
   {layers}, attention: sdpa, ffn: {{provider: moe, experts: 4}}}}
training:
  {{max_epochs: 3, steps_per_epoch: 2, batch_size: 4, warmup_steps: 1, save_every: 1, keep_last: 9, switch_tolerance: null}}
schedules: {{{schedules}}}
data: {{source: {source}, path: "{path}"}}
evaluation: {{max_batches: 2, sample_tokens: 0}}
monitoring: {{plot: false}}
hardware: {{threads: 1, device: {device}, deterministic: true}}
"""


def test_no_provider_is_left_out() -> None:
    kinds = {kind for kind, _ in PARTS}
    assert {(kind, name) for kind in kinds for name in registry.list_providers(kind)[kind]} == PARTS.keys() | ELSEWHERE


def fit(profile: Path, out: Path, sets: Sequence[str], resume: str = "never") -> RunResult:
    loaded = load_profile(profile, sets=sets)
    quiet = Console(file=io.StringIO())
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=quiet, resume=resume).fit()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": f"n{each}", "target": f"{each}n"}) + "\n" for each in range(200)))
    return path


# What Dynamo provokes by looking, and tells no user of.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",
    "ignore:.*autograd.*should not be instantiated:DeprecationWarning",
    # Inductor's advice, and what has no deterministic kernel: equal bits are asked for below all the same.
    "ignore:.*TensorFloat32 tensor cores",
    "ignore:.*does not have a deterministic implementation",
    "ignore:.*torch._inductor",
    "ignore:.*Online softmax",
    "ignore:.torch.jit:DeprecationWarning",
)
@pytest.mark.timeout(600)  # inductor takes its time
@pytest.mark.parametrize(("part", "mode", "device"), CASES)
def test_it_trains_over_both_switches_resumes_to_the_same_bits_and_writes(
    text: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, mode: str, device: str
) -> None:
    if mode == "inductor":
        mode = "compiled"
    else:
        whole = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: whole(self, backend="eager", **kwargs))
    source, path = ("pairs", pairs) if mode == "pairs" else ("files", text)
    plugins = ["moe"] if mode == "pairs" else ["moe", "align"]
    schedules = ", ".join(f"enable_{plugin}_at_epoch: {epoch}" for epoch, plugin in enumerate(plugins, 1))
    layers = "num_encoder_layers: 1, num_decoder_layers: 1" if mode == "pairs" else "num_layers: 2"
    sets = [*([] if mode == "pairs" else [ALIGN % "bistate_default"]), part, *MODES[mode]]
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        PROFILE.format(
            source=source, path=path, layers=layers, plugins=", ".join(plugins), schedules=schedules, device=device
        )
    )
    result = fit(profile, tmp_path / "whole", sets)
    assert math.isfinite(result.validation.loss)
    events = read_metrics(tmp_path / "whole")
    assert [each["plugin"] for each in events if each["event"] == "switch"] == plugins
    fit(profile, tmp_path / "rest", sets, resume=str(tmp_path / "whole" / "step-000003"))
    run = load_run(tmp_path / "rest")
    expected = load_run(tmp_path / "whole").model.state_dict()
    assert not [name for name, value in run.model.state_dict().items() if not torch.equal(value, expected[name])]
    assert {each.device.type for each in result.model.state_dict().values()} == {device}
    assert len(generate(run.model.to(device), run.tokenizer, "n1", max_new_tokens=4, seed=0).tokens) <= 4
