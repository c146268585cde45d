"""What attention made of heads has in common: the options of key heads, positions and window, and the sizes that follow.

Provider authors derive from `HeadsProvider` where their layer is an `apt.layers.heads.Heads`. Importing it needs no PyTorch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from apt.core.providers.attention import AttentionProvider
from apt.errors import Fault, OptionsError

_READ_BY = {
    "linear": set[str](),
    "ntk": set[str](),
    "yarn": {"original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"},
    "llama3": {"original_max_seq_len", "low_freq_factor", "high_freq_factor"},
}


def _changed(options: BaseModel) -> set[str]:
    """The options that are not as they are by default; a checkpoint states all of them."""
    fields = type(options).model_fields.items()
    return {name for name, field in fields if getattr(options, name) != field.get_default()}


class RopeScaling(BaseModel):
    """How rotary positions are stretched to a context `factor` times as long; the formulas are in `apt.layers.rope`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    type: Literal["linear", "ntk", "yarn", "llama3"] = Field(description="the rule")
    factor: float = Field(ge=1, description="the new context over the old one")
    original_max_seq_len: int | None = Field(
        default=None, ge=1, description="yarn, llama3: the context that the model was trained with"
    )
    beta_fast: float = Field(
        default=32.0, gt=0, description="yarn: turns within the old context above which nothing changes"
    )
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: turns below which positions are divided by factor")
    attention_factor: float | None = Field(
        default=None, gt=0, description="yarn: what queries and keys are multiplied by; none: 0.1 ln(factor) + 1"
    )
    low_freq_factor: float = Field(
        default=1.0, gt=0, description="llama3: turns below which positions are divided by factor"
    )
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3: turns above which nothing changes")

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        """No option that the rule would not read, and all that it needs."""
        foreign = sorted(_changed(self) - {"type", "factor"} - _READ_BY[self.type])
        if foreign:
            raise ValueError(f"type {self.type} does not read {', '.join(foreign)}; leave out what it does not read")
        if "original_max_seq_len" in _READ_BY[self.type] and self.original_max_seq_len is None:
            raise ValueError(
                f"type {self.type} needs original_max_seq_len, the context that the model was trained with"
            )
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow:g} must be less than beta_fast {self.beta_fast:g}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be less than high_freq_factor {self.high_freq_factor:g}"
            )
        return self


class HeadsProvider(AttentionProvider):
    """Attention whose queries, keys and values come in heads of one width."""

    num_kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="heads of keys and values, each shared by a group of query heads; none: num_heads",
    )
    positions: Literal["rope", "learned", "none"] = Field(
        default="rope",
        description="rope turns queries and keys; learned adds a table of max_seq_len positions to the embeddings; none",
    )
    rope_theta: float = Field(default=10_000.0, gt=1, description="base of the rotary positions")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="stretches rotary positions to a longer context: a mapping with type and factor"
    )
    window: int | None = Field(
        default=None, ge=1, description="tokens that each token sees, itself and those before it; none: all"
    )

    @model_validator(mode="after")
    def _rope_is_there(self) -> Self:
        if self.positions != "rope":
            unread = sorted(_changed(self) & {"rope_theta", "rope_scaling"})
            if unread:
                raise ValueError(f"positions {self.positions!r} does not read {' and '.join(unread)}; leave them out")
        return self

    def get_window(self) -> int | None:
        """The option."""
        return self.window

    def needs_position_table(self) -> bool:
        """Where positions are learned the model adds them to its embeddings."""
        return self.positions == "learned"

    def get_kv_heads(self, num_heads: int) -> int:
        """Heads of keys and values in a layer of `num_heads`."""
        return num_heads if self.num_kv_heads is None else self.num_kv_heads

    def get_head_width(self, d_model: int, num_heads: int) -> int:
        """d = d_model / num_heads. Raises `apt.errors.OptionsError` where the numbers do not divide, or positions cannot turn."""
        self.check_groups(num_heads)
        if d_model % num_heads:
            raise self.refuse("num_heads", f"{num_heads} heads do not divide d_model {d_model}")
        return self.check_turns(d_model // num_heads, "num_heads")

    def turns_whole_heads(self) -> bool:
        """Whether rotary positions turn queries and keys of the whole width, which must then be even."""
        return self.positions == "rope"

    def check_turns(self, width: int, option: str) -> int:
        """The width, which `option` decides. Raises `apt.errors.OptionsError` where it is odd and turned."""
        if width % 2 and self.turns_whole_heads():
            odd = f"rotary positions turn pairs, and heads of width {width} are odd"
            raise self.refuse(option, odd, "an even width, or other positions")
        return width

    def refuse(self, option: str, what: str, hint: str = "") -> OptionsError:
        """The error for sizes that do not fit: of the model, or of the provider's options."""
        where = "model" if option in ("num_heads", "d_model", "attention_dropout") else f"model.{self.kind}"
        return OptionsError(self.kind, self.get_name(), [Fault(f"{where}.{option}", what, hint)])

    def check_groups(self, num_heads: int) -> None:
        """Raises `apt.errors.OptionsError` where heads of keys do not divide the heads."""
        if num_heads % self.get_kv_heads(num_heads):
            raise self.refuse("num_kv_heads", f"{self.num_kv_heads} does not divide the model's {num_heads} heads")


class SizedHeadsProvider(HeadsProvider):
    """Heads whose width, norms and biases are options, as published models have them in several ways."""

    head_width: int | None = Field(
        default=None, ge=1, description="width of a head; none: d_model / num_heads, which must then divide"
    )
    qk_norm: bool = Field(default=False, description="an RMSNorm of each query and key, over its width")
    bias: Literal["none", "qkv", "all"] = Field(
        default="none", description="where biases are: on queries, keys and values (as in Qwen2), or on the output too"
    )

    def get_head_width(self, d_model: int, num_heads: int) -> int:
        """The option, or d_model / num_heads. Raises `apt.errors.OptionsError` where it does not fit."""
        if self.head_width is None:
            return super().get_head_width(d_model, num_heads)
        self.check_groups(num_heads)
        return self.check_turns(self.head_width, "head_width")
