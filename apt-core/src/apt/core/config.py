"""The profile as a value: one frozen, validated object that says everything about a model and its run.

`APTConfig` is flat for what the model is (the predecessor's fields) and has a closed section for each other concern.
For every kind of component it holds the chosen provider's name (`attention_name`, ...), its options (`options[kind]`)
and what may stand in for it (`fallback[kind]`). How a YAML document becomes an `APTConfig` is in `apt.core.profile`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Section(BaseModel):
    """A closed, frozen group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """A provider that is asked for: its name, what may stand in for it, in order, and its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: str
    fallback: tuple[str, ...] = ()
    options: dict[str, JsonValue] = {}


class Training(Section):
    """How long and in what portions. The optimizer's numbers (base_lr, warmup_steps, weight_decay, gradient_clip)
    are fields of `APTConfig`; in a profile they stand here, as learning_rate and so on."""

    max_epochs: int | None = Field(default=None, ge=1, description="stop after so many epochs")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many optimizer steps")
    steps_per_epoch: int | None = Field(default=None, ge=1, description="optimizer steps an epoch; none: the data's")
    batch_size: int = Field(default=32, ge=1, description="sequences a micro-batch")
    accumulate: int = Field(default=1, ge=1, description="micro-batches an optimizer step")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="the last learning rate over the highest")
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    save_every: int | None = Field(
        default=None, ge=1, description="optimizer steps between checkpoints; none: an epoch"
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints that are kept")


class Data(BaseModel):
    """Where the text comes from. Keys that are not listed here are options of the source's provider."""

    model_config = ConfigDict(frozen=True, extra="allow")

    source: str = "stdlib"
    tokenizer: Choice = Choice(provider="byte")

    @property
    def choice(self) -> Choice:
        """The source as a provider that is asked for."""
        return Choice(provider=self.source, options=dict(self.model_extra or {}))


class Evaluation(Section):
    """How the held-out text is scored."""

    eval_every: int | None = Field(
        default=None, ge=1, description="optimizer steps between evaluations; none: an epoch"
    )
    max_batches: int | None = Field(default=None, ge=1, description="batches an evaluation; none: the whole split")
    sample_prompt: str = Field(default="", description="the prompt of the sample after training")
    sample_tokens: int = Field(default=200, ge=0, description="the length of that sample")


class Monitoring(Section):
    """What is reported while training."""

    log_every: int = Field(default=10, ge=1, description="optimizer steps between lines of metrics.jsonl")
    plot: bool = True


class Hardware(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads; none: PyTorch's choice")


class Debug(Section):
    """Aids for finding faults."""

    detect_anomaly: bool = False


class APTConfig(BaseModel):
    """A model and its run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "unnamed"
    version: str = "1"
    description: str = ""

    architecture: Literal["decoder", "encoder_decoder"] = "decoder"
    vocab_size: int = Field(default=50257, ge=1)
    d_model: int = Field(default=768, ge=1)
    d_ff: int = Field(default=2048, ge=1)
    num_heads: int = Field(default=12, ge=1)
    num_layers: int | None = Field(default=None, ge=1)
    num_encoder_layers: int = Field(default=6, ge=0)
    num_decoder_layers: int = Field(default=6, ge=0)
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

    # Fields of the predecessor that its providers read; they are kept, and given to the provider of that name.
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

    def choice(self, kind: str) -> Choice:
        """The provider of this kind that the profile asks for."""
        name: str = getattr(self, f"{kind}_name")
        return Choice(provider=name, fallback=self.fallback.get(kind, ()), options=self.options.get(kind, {}))

    def get_provider_config(self, kind: str) -> dict[str, JsonValue]:
        """The options of the provider of this kind, as the profile gives them."""
        return dict(self.options.get(kind, {}))


APTModelConfig = APTConfig
