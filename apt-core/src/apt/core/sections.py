"""The closed sections of a profile that are not the model: how it is trained, on what, and what is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer, WithJsonSchema

Beta = Annotated[float, Field(ge=0, lt=1)]
MINUTES = r"^\d+(\.\d+)? ?min$"


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
    accumulate: int = Field(default=1, ge=1, le=1_000_000, description="micro-batches an optimizer step")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="the last learning rate over the highest")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: for the matrices of blocks, and adamw for all else"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    save_every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=MINUTES)] | None = Field(
        default=None, description="optimizer steps between checkpoints, or a time such as 10 min; none: an epoch"
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints that are kept")
    keep_best: bool = Field(default=False, description="whether the one of the lowest held-out loss is kept too")
    async_save: bool = Field(default=False, description="whether training goes on while a checkpoint is written")
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="what a loss or gradient that is not finite does: stop the run, skip the step, or go back to the "
        "last checkpoint and leave out what was read since",
    )
    switch_tolerance: float | None = Field(
        default=1e-4,
        ge=0,
        description="nats a token by which switching a plugin on may change the loss of a fixed held-out batch; none: any",
    )
    recompute: bool = Field(
        default=False, description="whether each block's activations are computed anew in the backward pass"
    )


class Data(BaseModel):
    """Where the text comes from. Keys that are not listed here are options of the source's provider."""

    model_config = ConfigDict(frozen=True, extra="allow")

    source: str = "stdlib"
    tokenizer: Choice = Choice(provider="byte")
    cache: str | None = Field(
        default=None, description="the folder that keeps tokens between runs; none: APT_CACHE_DIR, or the platform's"
    )

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
    samples: bool = Field(default=False, description="whether such a sample is drawn at each evaluation as well")


def _asked(value: object) -> object:
    """A provider as a profile asks for it: a name, or a mapping of `provider` and its options."""
    if isinstance(value, str):
        return {"provider": value}
    if isinstance(value, Mapping) and "options" not in value:
        return {"provider": value.get("provider"), "options": {k: v for k, v in value.items() if k != "provider"}}
    return value


def _said(choice: Choice) -> dict[str, JsonValue]:
    return {"provider": choice.provider, **choice.options}


Logging = Annotated[
    Choice, BeforeValidator(_asked), PlainSerializer(_said), WithJsonSchema({"x-provider-kind": "logger"})
]


class Monitoring(Section):
    """What is reported while training."""

    log_every: int = Field(default=10, ge=1, description="optimizer steps between lines of metrics.jsonl")
    plot: bool = True
    tensorboard: bool = Field(default=False, description="whether TensorBoard's event files are written")
    loggers: tuple[Logging, ...] = Field(default=(), description="providers that are told every event")
    spike: float | None = Field(
        default=None,
        gt=0,
        description="standard deviations over the last 50 steps' mean at which a loss is a spike; none: not watched",
    )


class Hardware(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    peak_flops: float | None = Field(
        default=None,
        gt=0,
        description="floating-point operations a second of one device, to say which share is used; none: known GPUs' own",
    )
    threads: int | None = Field(default=None, ge=1, le=4096, description="CPU threads; none: PyTorch's choice")
    matmul: Literal["strict", "auto"] = Field(
        default="strict",
        description="how products are computed: strict, by PyTorch's defaults; auto, by what is fastest on this machine and as "
        "exact, measured at the start and kept for the run",
    )
    deterministic: bool = Field(
        default=False,
        description="whether a GPU takes kernels alone that give the same bits every time, so that a resume is exact; slower",
    )
    parallel: Literal["none", "ddp", "fsdp"] = Field(
        default="none",
        description="how the processes that torchrun starts share the work: each a part of every batch, and with fsdp a part of "
        "every parameter too",
    )
    expert_parallel: int = Field(
        default=1,
        ge=1,
        description="ranks among which the experts of each mixture are shared out; it divides the number of processes",
    )


class Debug(Section):
    """Aids for finding faults."""

    detect_anomaly: bool = Field(
        default=False, description="whether PyTorch looks for the operation that made a gradient NaN; slow"
    )
