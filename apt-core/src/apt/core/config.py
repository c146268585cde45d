"""The profile as a value: one frozen, validated object that says everything about a model and its run.

`APTConfig` is flat for what the model is (the predecessor's fields) and has a closed section for each other concern.
For every kind of component it holds the chosen provider's name (`attention_name`, ...), its options (`options[kind]`)
and what may stand in for it (`fallback[kind]`). How a YAML document becomes an `APTConfig` is in `apt.core.profile`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from apt.core.hardware import HardwareProfile
from apt.core.options import explain, mistyped
from apt.core.sections import Choice, Data, Debug, Evaluation, Hardware, Monitoring, Section, Training
from apt.errors import Fault, ProfileError, nearest

CONFIG_FILE = "config.json"
MAX_LAYERS = 10_000
"""Each is looked at before anything is built, so that a slip of the pen must not take forever."""

PREDECESSOR = (
    *("epsilon", "alpha", "beta", "use_autopoietic", "sr_ratio", "init_tau", "batch_first", "use_dbc_dac"),
    *("rank_ratio_proj", "rank_ratio_res", "dbc_threshold", "dbc_iterations", "tokenizer_type", "language"),
)
"""Fields that the predecessor's configurations have. They are kept; nothing here reads them, and profiles say so."""
OF_AUTOPOIETIC = ("epsilon", "alpha", "beta", "sr_ratio", "init_tau")
"""Those of them that are options of the attention provider `autopoietic` today."""


def _name(name: str) -> str:
    """A name that a folder may have anywhere."""
    if not name.strip() or name.startswith(".") or len(name) > 100 or set(name) & set("/\\\n\t\0"):
        raise ValueError(
            "must be a name for a folder: 1 to 100 characters, none of them a slash, no dot at its beginning"
        )
    return name


class APTConfig(BaseModel):
    """A model and its run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_name)] = Field(
        default="unnamed", description="what the run, and its folder, is called"
    )
    version: str = "1"
    description: str = ""

    architecture: Literal["decoder", "encoder_decoder"] = "decoder"
    vocab_size: int = Field(default=50257, ge=1)
    d_model: int = Field(default=768, ge=1)
    d_ff: int = Field(default=2048, ge=1)
    num_heads: int = Field(default=12, ge=1)
    num_layers: int | None = Field(default=None, ge=1, le=MAX_LAYERS)
    num_encoder_layers: int = Field(default=6, ge=0, le=MAX_LAYERS)
    num_decoder_layers: int = Field(default=6, ge=0, le=MAX_LAYERS)
    dropout: float = Field(default=0.15, ge=0, lt=1)
    attention_dropout: float = Field(default=0.15, ge=0, lt=1)
    max_seq_len: int = Field(default=512, ge=1)
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    tie_embeddings: bool = True
    pad_token_id: int = Field(default=0, ge=0)
    bos_token_id: int = Field(default=1, ge=0)
    eos_token_id: int = Field(default=2, ge=0)

    attention_name: str = "tva_default"
    ffn_name: str = "default"
    router_name: str = "topk_default"
    align_name: str = "bistate_default"
    retrieval_name: str = "none"
    options: dict[str, dict[str, JsonValue]] = {}
    fallback: dict[str, tuple[str, ...]] = {}

    base_lr: float = Field(default=4e-5, gt=0)
    warmup_steps: int = Field(default=1500, ge=0)
    weight_decay: float = Field(default=0.015, ge=0)
    gradient_clip: float = Field(default=0.8, ge=0, description="the largest norm of the gradient; 0: no limit")

    # The predecessor's (see `PREDECESSOR`).
    epsilon: float = 0.08
    alpha: float = 0.0008
    beta: float = 0.003
    use_autopoietic: bool = True
    sr_ratio: int = 6
    init_tau: float = 1.3
    batch_first: bool = True
    use_dbc_dac: bool = False
    rank_ratio_proj: float = 0.1
    rank_ratio_res: float = 0.05
    dbc_threshold: float = 1e-6
    dbc_iterations: int = 1
    tokenizer_type: str | None = None
    language: str | None = None

    plugins: tuple[str, ...] = ()
    schedules: dict[str, JsonValue] = {}
    training: Training = Training()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    monitoring: Monitoring = Monitoring()
    hardware: Hardware = Hardware()
    debug: Debug = Debug()
    extra: dict[str, JsonValue] = {}

    @property
    def num_blocks(self) -> int:
        """The number of decoder blocks."""
        return self.num_decoder_layers if self.num_layers is None else self.num_layers

    @property
    def num_encoder_blocks(self) -> int:
        """The number of encoder blocks, 0 in a decoder."""
        return self.num_encoder_layers if self.architecture == "encoder_decoder" else 0

    def choice(self, kind: str) -> Choice:
        """The provider of this kind that the profile asks for."""
        name: str = getattr(self, f"{kind}_name")
        return Choice(provider=name, fallback=self.fallback.get(kind, ()), options=self.options.get(kind, {}))

    @classmethod
    def from_yaml(cls, path: str | Path) -> APTConfig:
        """The configuration of a profile; see `apt.core.profile.load_profile`. Raises `ProfileError`."""
        from apt.core.profile import load_profile

        return load_profile(path).config

    def to_dict(self) -> dict[str, JsonValue]:
        """Every field as a JSON value."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, object], name: str = "config") -> APTConfig:
        """The configuration that `to_dict`, or the predecessor, wrote; what it does not know goes into `extra`.

        Raises `ProfileError` with every fault; `name` is what the document is called there.
        """
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        unknown = {key: value for key, value in values.items() if key not in cls.model_fields}
        extra = known.get("extra", {})
        if unknown and isinstance(extra, Mapping):
            twice = sorted(unknown.keys() & extra.keys())
            if twice:
                raise ProfileError([Fault(f"{name}: {key}", "stands in extra as well", "keep one") for key in twice])
            known["extra"] = {**extra, **unknown}
        if known.get("attention_name") == "autopoietic" and "options" not in known:
            known["options"] = {"attention": {key: known[key] for key in OF_AUTOPOIETIC if key in known}}
        faults = mistyped(cls, known)
        try:
            config = cls.model_validate(known)
        except ValidationError as error:
            faults += [
                fault for fault in explain(error, cls, known) if fault.where not in {each.where for each in faults}
            ]
        if faults:
            raise ProfileError([Fault(f"{name}: {fault.where}", fault.what, fault.hint) for fault in faults])
        return config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` into a folder, which is made where it is missing."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> APTConfig:
        """The ``config.json`` of a folder. Raises `ProfileError` where it is missing or wrong."""
        path = Path(folder) / CONFIG_FILE
        try:
            values = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ProfileError([Fault(str(path), f"cannot be read: {error.strerror}")]) from error
        except (ValueError, RecursionError) as error:
            raise ProfileError([Fault(str(path), f"is not JSON: {error}")]) from error
        if not isinstance(values, dict):
            raise ProfileError([Fault(str(path), f"holds a {type(values).__name__}, not an object")])
        return cls.from_dict(values, str(path))

    def get_provider_config(self, kind: str) -> dict[str, JsonValue]:
        """The options of the provider of this kind, as the profile gives them."""
        return dict(self.options.get(kind, {}))


APTModelConfig = APTConfig


class MultimodalConfig(Section):
    """Which modalities beside text a model takes, and in what form."""

    enable_image: bool = False
    enable_audio: bool = False
    image_size: int = Field(default=224, ge=1, description="pixels a side")
    patch_size: int = Field(default=16, ge=1, description="pixels a side of one patch")
    audio_sample_rate: int = Field(default=16000, ge=1, description="Hz")
    max_audio_length: int = Field(default=10, ge=1, description="seconds")
    modality_dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole_patches(self) -> MultimodalConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    def get_enabled_modalities(self) -> list[str]:
        """``text`` and what is enabled."""
        return ["text", *(name for name in ("image", "audio") if getattr(self, f"enable_{name}"))]


SIZES = {
    "tiny": {"d_model": 128, "num_heads": 4, "d_ff": 512, "num_layers": 4, "max_seq_len": 256},
    "small": {"d_model": 512, "num_heads": 8, "d_ff": 2048, "num_layers": 6, "max_seq_len": 512},
    "base": {"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 12, "max_seq_len": 1024},
    "large": {"d_model": 1024, "num_heads": 16, "d_ff": 4096, "num_layers": 24, "max_seq_len": 2048},
}
"""Shapes of `create_optimized_config`: base is GPT-2's, large is GPT-2 medium's (Radford et al. 2019, table 2)."""


def create_optimized_config(
    size: Literal["tiny", "small", "base", "large"] = "small",
    language: str = "en",
    use_autopoietic: bool = True,
    multimodal: bool = False,
) -> APTConfig:
    """A decoder of a usual size, with autopoietic attention where `use_autopoietic`, else scaled dot-product attention.

    With `multimodal` the default `MultimodalConfig` with images and sound enabled stands in `extra`. Raises `ProfileError`
    for another size.
    """
    if size not in SIZES:
        raise ProfileError([Fault("size", f"{size!r} is not one of {', '.join(SIZES)}", nearest(size, SIZES))])
    modalities = MultimodalConfig(enable_image=True, enable_audio=True).model_dump(mode="json")
    return APTConfig.model_validate(
        {
            "name": f"apt-{size}",
            **SIZES[size],
            "language": language,
            "use_autopoietic": use_autopoietic,
            "attention_name": "autopoietic" if use_autopoietic else "sdpa",
            "extra": {"multimodal": modalities} if multimodal else {},
        }
    )


__all__ = [
    "APTConfig",
    "APTModelConfig",
    "Choice",
    "Data",
    "Debug",
    "Evaluation",
    "Hardware",
    "HardwareProfile",
    "Monitoring",
    "MultimodalConfig",
    "Section",
    "Training",
    "create_optimized_config",
]
