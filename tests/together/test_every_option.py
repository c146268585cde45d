"""A run with every key of a profile at a value that is not its default; a new key fails here until it has one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from apt.core import yaml
from apt.core.config import PREDECESSOR, APTConfig
from apt.core.profile import MODEL, RENAMED, SECTIONS, load_profile
from apt.training.checkpoint import list_checkpoints, load_run
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

VALUES: dict[str, dict[str, object]] = {
    "model": {
        **{"vocab_size": 300, "d_model": 32, "d_ff": 48, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 3},
        **{"dropout": 0.1, "attention_dropout": 0.2, "max_seq_len": 32, "activation": "relu", "layer_norm_eps": 1e-6},
        **{"norm": "rmsnorm", "tie_embeddings": False, "pad_token_id": 3, "bos_token_id": 2, "eos_token_id": 1},
    },
    "training": {
        **{"max_epochs": 3, "max_steps": 11, "steps_per_epoch": 4, "batch_size": 4, "accumulate": 2},
        **{"lr_schedule": "wsd", "min_lr_ratio": 0.2, "betas": [0.8, 0.99], "seed": 3, "precision": "bf16"},
        **{"compile": True, "save_every": 3, "keep_last": 3, "keep_best": True, "async_save": True},
        **{"on_nonfinite": "skip", "switch_tolerance": 0.01, "optimizer": "muon", "recompute": True},
        **{"learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.1, "gradient_clip": 0.5},
    },
    "evaluation": {"eval_every": 2, "max_batches": 3, "sample_prompt": "def ", "sample_tokens": 4, "samples": True},
    "monitoring": {"log_every": 2, "plot": False, "spike": 3.0},
    "hardware": {
        "device": "cpu",
        "threads": 1,
        "parallel": "fsdp",
        "matmul": "auto",
        "peak_flops": 1e12,
        "deterministic": True,
    },
    "debug": {"detect_anomaly": True},
}
ELSEWHERE = {
    "model.architecture": "a decoder is trained here",
    "model.num_encoder_layers": "of the other architecture",
    "model.router_name": "the predecessor's",
    "hardware.expert_parallel": "needs two ranks; test_ranks.py has them",
    "monitoring.tensorboard": "needs an extra; apt-core/tests/training/test_seeing.py has it",
    "monitoring.loggers": "need extras; apt-core/tests/training/test_seeing.py has them",
}


def test_no_key_is_left_out() -> None:
    keys = {f"model.{key}" for key in MODEL if key not in PREDECESSOR}
    keys |= {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    keys |= {f"training.{key}" for key in RENAMED}
    here = {f"{name}.{key}" for name, values in VALUES.items() for key in values}
    assert here | ELSEWHERE.keys() == keys
    assert not here & ELSEWHERE.keys()


def test_every_value_is_another_than_the_default() -> None:
    for name, values in VALUES.items():
        own = SECTIONS[name].model_fields if name in SECTIONS else {}
        for key, value in values.items():
            field = own[key] if key in own else APTConfig.model_fields[RENAMED.get(key, key)]
            default = field.get_default()
            assert value != (list(default) if isinstance(default, tuple) else default), f"{name}.{key}"


@pytest.mark.timeout(900)  # a busy machine is no fault of the code
# What Dynamo provokes by looking, and tells no user of.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*autograd.*should not be instantiated:DeprecationWarning"
)
def test_a_profile_with_every_option_at_another_value_runs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: whole(self, backend="eager", **kwargs))
    values = {
        "name": "everything",
        "version": "2",
        "description": "every key",
        "plugins": ["moe", "align"],
        "schedules": {"enable_moe_at_epoch": 1, "enable_align_at_step": 7},
        "data": {"source": "files", "path": str(text)},
        **{name: dict(section) for name, section in VALUES.items()},
    }
    values["model"] |= {  # type: ignore[operator]
        "attention": {"provider": "sdpa"},
        "ffn": {"provider": "moe", "experts": 4},
        "align": {"provider": "bistate_default", "state": "dropout"},
    }
    profile = tmp_path / "everything.yaml"
    profile.write_text(yaml.dump(values))  # type: ignore[arg-type]
    loaded = load_profile(profile)
    out = tmp_path / "run"
    Trainer(loaded.config, out, resolved=loaded.resolved, console=Console(file=io.StringIO())).fit()
    events = read_metrics(out)
    assert [event["step"] for event in events if event["event"] == "train"] == [1, 2, 4, 6, 8, 10, 11]
    assert [event["step"] for event in events if event["event"] == "evaluation"] == [2, 4, 6, 8, 10, 11]
    assert [event["plugin"] for event in events if event["event"] == "switch"] == ["moe", "align"]
    # Every third step is saved, and every second where its score is the best so far; the last ones of both are kept.
    assert {folder.name for folder in list_checkpoints(out)} >= {"step-000009", "step-000011"}
    assert [event["step"] for event in events if event["event"] == "sample"] == [2, 4, 6, 8, 10, 11]
    assert load_run(out).state.step == 11
