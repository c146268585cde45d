"""`APTConfig` and what stands beside it: the contract's names and defaults, files, machines, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apt.core.config import (
    APTConfig,
    APTModelConfig,
    HardwareProfile,
    MultimodalConfig,
    Training,
    create_optimized_config,
)
from apt.core.estimate import estimate
from apt.core.resolve import resolve_config
from apt.errors import ProfileError

CONTRACT = {
    "vocab_size": 50257, "d_model": 768, "d_ff": 2048, "num_heads": 12, "num_encoder_layers": 6, "num_decoder_layers": 6,
    "dropout": 0.15, "max_seq_len": 512, "epsilon": 0.08, "alpha": 0.0008, "beta": 0.003, "use_autopoietic": True,
    "sr_ratio": 6, "init_tau": 1.3, "base_lr": 4e-5, "warmup_steps": 1500, "weight_decay": 0.015,
    "attention_dropout": 0.15, "gradient_clip": 0.8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "activation": "gelu", "batch_first": True, "layer_norm_eps": 1e-5, "use_dbc_dac": False, "rank_ratio_proj": 0.1,
    "rank_ratio_res": 0.05, "dbc_threshold": 1e-6, "dbc_iterations": 1, "tokenizer_type": None, "language": None,
    "attention_name": "tva_default", "ffn_name": "default", "router_name": "topk_default",
    "align_name": "bistate_default", "retrieval_name": "none", "plugins": [], "schedules": {}, "extra": {},
    "architecture": "decoder", "num_layers": None,
}  # fmt: skip


def test_the_contracts_fields_have_their_defaults() -> None:
    values = APTConfig().to_dict()
    assert {name: values[name] for name in CONTRACT} == CONTRACT
    assert APTModelConfig is APTConfig


def test_a_configuration_is_never_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        APTConfig().d_model = 3  # type: ignore[misc]


def test_dictionaries_and_files_bring_back_the_same(tmp_path: Path) -> None:
    config = APTConfig(d_model=64, training=Training(max_epochs=2), options={"ffn": {"bias": True}}, plugins=("moe",))
    assert APTConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path / "new")
    assert APTConfig.from_pretrained(tmp_path / "new") == config
    assert config.get_provider_config("ffn") == {"bias": True}


def test_what_is_not_known_survives_in_extra_and_extra_too() -> None:
    config = APTConfig.from_dict({"mine": {"a": [1]}, "extra": {"b": 2}, "d_model": 64})
    assert config.extra == {"mine": {"a": [1]}, "b": 2}
    assert APTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ProfileError, match="config: b: stands in extra as well"):
        APTConfig.from_dict({"b": 1, "extra": {"b": 2}})


def test_the_predecessors_config_json_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONTRACT | {"plugins": ["moe"], "model_type": "apt"}))
    config = APTConfig.from_pretrained(tmp_path)
    assert config.plugins == ("moe",)
    assert config.extra == {"model_type": "apt"}


def test_the_predecessors_numbers_of_autopoietic_attention_become_its_options() -> None:
    config = APTConfig.from_dict({"attention_name": "autopoietic", "epsilon": 0.1, "init_tau": 1.2})
    assert config.get_provider_config("attention") == {"epsilon": 0.1, "init_tau": 1.2}
    assert APTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: cannot be read: No such file"),
        ("{", "config.json: is not JSON"),
        ("[1]", "config.json: holds a list, not an object"),
        ('{"d_model": -1, "dropout": 2}', r"config.json: d_model: -1 is not allowed.*\n.*dropout: 2 is not allowed"),
    ],
)
def test_a_wrong_file_is_told_with_all_its_faults(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ProfileError, match=message):
        APTConfig.from_pretrained(tmp_path)


def test_modalities() -> None:
    config = MultimodalConfig(enable_image=True)
    assert config.num_patches == 196
    assert config.get_enabled_modalities() == ["text", "image"]
    defaults = MultimodalConfig()
    assert (defaults.audio_sample_rate, defaults.max_audio_length, defaults.modality_dropout) == (16000, 10, 0.1)
    with pytest.raises(ValueError, match="image_size 225 is not a multiple of patch_size 16"):
        MultimodalConfig(image_size=225)


def test_sizes_grow_and_carry_what_was_asked() -> None:
    sizes = [create_optimized_config(size, use_autopoietic=False) for size in ("tiny", "small", "base", "large")]  # type: ignore[arg-type]
    assert [each.attention_name for each in sizes] == ["sdpa"] * 4
    assert sorted(each.d_model for each in sizes) == [each.d_model for each in sizes]
    config = create_optimized_config("base", language="de", multimodal=True)
    assert (config.attention_name, config.language, config.num_blocks) == ("autopoietic", "de", 12)
    assert config.extra["multimodal"]["enable_audio"] is True  # type: ignore[index,call-overload]
    with pytest.raises(ProfileError, match=r"'tinny' is not one of tiny, small, base, large; did you mean 'tiny'\?"):
        create_optimized_config("tinny")  # type: ignore[arg-type]


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_every_size_can_be_resolved_kept_and_foretold(size: str, multimodal: bool, tmp_path: Path) -> None:
    config = create_optimized_config(size, use_autopoietic=False, multimodal=multimodal)  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    assert APTConfig.from_pretrained(tmp_path) == config
    parameters = estimate(config, resolve_config(config)).parameters
    assert parameters == pytest.approx({"tiny": 7.2e6, "small": 44.6e6, "base": 123e6, "large": 353e6}[size], rel=0.02)
    assert ("multimodal" in config.extra) == multimodal


def test_this_machine_is_described(tmp_path: Path) -> None:
    machine = HardwareProfile.detect_hardware(tmp_path)
    assert machine.cpu_count >= 1
    assert machine.ram_size > 256
    assert machine.gpu_count == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_machine_is_compatible_where_a_step_and_the_checkpoints_fit() -> None:
    config = create_optimized_config("small", use_autopoietic=False)
    machine = HardwareProfile(ram_size=32_000, disk_space=50_000)
    assert machine.is_compatible_with(config)
    assert not machine.model_copy(update={"ram_size": 1000}).is_compatible_with(config)
    assert not machine.model_copy(update={"disk_space": 100}).is_compatible_with(config)
    on_gpu = machine.model_copy(update={"gpu_count": 1, "gpu_memory": 500})
    assert not on_gpu.is_compatible_with(config)
