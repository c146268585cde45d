"""The Llama family's shape, in its three spellings: Hugging Face's config.json, GGUF's keys, and a profile.

Touvron et al. 2023, arXiv:2302.13971, section 2.2: pre-norm with RMSNorm, SwiGLU, rotary positions in the half-split layout,
no biases; grouped queries since Llama 2 (arXiv:2307.09288). Whatever is another model is refused with every reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apt.builtin.attention import SDPA
from apt.core.config import APTConfig
from apt.errors import Fault, FaultsError

if TYPE_CHECKING:
    from torch import Tensor

FAMILY = ("llama", "mistral", "qwen2")
"""Values of config.json's model_type whose models have this shape; qwen2 has biases on queries, keys and values."""

SAME = ("sdpa", "flex", "flash_v2")
"""Attentions that are one mathematics with the same weights; only flex has an option of its own, `compiled`."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes and ids of one model. `rope_scaling` is as the attention provider's option; None: positions as they are."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    tied: bool
    head_width: int | None = None
    """Of a head; None: d_model / num_heads."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which of the attention's products have offsets."""
    window: int | None = None
    rope_scaling: Mapping[str, object] | None = None
    bos: int | None = None
    eos: tuple[int, ...] = (2,)
    """The ids that end a text; the first is a profile's eos_token_id."""
    pad: int | None = None

    @property
    def width(self) -> int:
        """Of one head."""
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    def to_profile(self) -> dict[str, object]:
        """The section `model` of a profile of this shape."""
        attention: dict[str, object] = {"provider": "sdpa", "rope_theta": self.rope_theta}
        more = {
            "num_kv_heads": None if self.num_kv_heads == self.num_heads else self.num_kv_heads,
            "head_width": self.head_width,
            "bias": None if self.bias == "none" else self.bias,
            "window": self.window,
            "rope_scaling": None if self.rope_scaling is None else dict(self.rope_scaling),
        }
        attention |= {key: value for key, value in more.items() if value is not None}
        # A model without an id of its own for the start of a text separates texts by the end's.
        ids = {"bos_token_id": self.eos[0] if self.bos is None else self.bos, "eos_token_id": self.eos[0]}
        if self.pad is not None:
            ids["pad_token_id"] = self.pad
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "max_seq_len": self.max_seq_len,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "norm": "rmsnorm",
            "layer_norm_eps": self.norm_eps,
            "tie_embeddings": self.tied,
            "attention": attention,
            "ffn": {"provider": "swiglu"},
            **ids,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, object], where: str) -> LlamaShape:
        """The shape that a config.json describes. Raises `FaultsError` with all that is not of this family."""
        faults: list[Fault] = []

        def refuse(key: str, hint: str = "") -> None:
            faults.append(Fault(f"{where}: {key}", f"{config.get(key)!r} is not what this family has", hint))

        def ids(key: str) -> tuple[int, ...]:
            try:
                return read_ids(config.get(key))
            except ValueError as error:
                faults.append(Fault(f"{where}: {key}", str(error)))
                return ()

        if config.get("model_type") not in FAMILY:
            refuse("model_type", f"models of the types {', '.join(FAMILY)} can be imported")
            raise FaultsError(faults)
        missing = [key for key in _SIZES if type(config.get(key)) is not int]
        if missing:
            raise FaultsError([Fault(f"{where}: {key}", "is missing, or is no whole number") for key in missing])
        sizes = {ours: int(str(config[theirs])) for theirs, ours in _SIZES.items()}
        if config.get("mlp_bias"):
            refuse("mlp_bias", "the feed-forward layers here have no biases")
        if config.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "swiglu's gate is silu")
        window = None
        try:
            window = _window(config, sizes)
        except ValueError as error:
            faults.append(Fault(f"{where}: sliding_window", str(error)))
        heads, width = sizes["num_heads"], config.get("head_dim")
        norm_eps = config.get("rms_norm_eps", 1e-6)
        if not _is_number(norm_eps):
            refuse("rms_norm_eps", "a number")
        theta, given = _positions(config)
        if not _is_number(theta):
            faults.append(Fault(f"{where}: rope_theta", f"{theta!r} is no number"))
        try:
            scaling = None if given is None else _scaling(given, sizes["max_seq_len"])
        except ValueError as error:
            faults.append(Fault(f"{where}: rope_scaling", str(error)))
        bos, eos, pad = ids("bos_token_id"), ids("eos_token_id"), ids("pad_token_id")
        if not eos:
            refuse("eos_token_id", "the id that ends a text")
        if faults:
            raise FaultsError(faults)
        kv_heads = config.get("num_key_value_heads")
        return cls(
            d_model=sizes["d_model"],
            d_ff=sizes["d_ff"],
            num_layers=sizes["num_layers"],
            num_heads=heads,
            vocab_size=sizes["vocab_size"],
            max_seq_len=sizes["max_seq_len"],
            num_kv_heads=kv_heads if isinstance(kv_heads, int) else heads,
            norm_eps=float(str(norm_eps)),
            rope_theta=float(str(theta)),
            tied=bool(config.get("tie_word_embeddings", False)),
            head_width=width if isinstance(width, int) and width * heads != sizes["d_model"] else None,
            bias="qkv" if config["model_type"] == "qwen2" else "all" if config.get("attention_bias") else "none",
            window=window,
            rope_scaling=scaling,
            bos=_first(bos),
            eos=eos,
            pad=_first(pad),
        )

    def to_hf(self) -> dict[str, object]:
        """A config.json for `LlamaForCausalLM`, in the spelling that transformers 4 and 5 both read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.width,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else _to_hf(self.rope_scaling),
            "hidden_act": "silu",
            "attention_bias": self.bias != "none",
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": list(self.eos) if len(self.eos) > 1 else self.eos[0],
            "pad_token_id": self.pad,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_config(cls, config: APTConfig, stop: tuple[int, ...] = ()) -> LlamaShape:
        """The shape of a profile's model; `stop` are further ids that end a text.

        Raises `FaultsError` with all that `LlamaForCausalLM` has no place for.
        """
        faults: list[Fault] = []

        def need(key: str, value: object, wanted: object) -> None:
            if value != wanted:
                faults.append(Fault(f"model.{key}", f"LlamaForCausalLM has {wanted}, this model {value}"))

        need("architecture", config.architecture, "decoder")
        need("norm", config.norm, "rmsnorm")
        if config.attention_name not in SAME:
            need("attention", config.attention_name, "sdpa")
        need("ffn", config.ffn_name, "swiglu")
        given = config.get_provider_config("attention") if config.attention_name in SAME else {}
        options = SDPA.model_validate({key: value for key, value in given.items() if key != "compiled"})
        need("attention.positions", options.positions, "rope")
        need("attention.window", options.window, None)
        need("attention.qk_norm", options.qk_norm, False)
        need("attention.sinks", options.sinks, False)
        scaling = None if options.rope_scaling is None else options.rope_scaling.model_dump(exclude_none=True)
        if scaling is not None and scaling["type"] == "ntk":
            faults.append(Fault("model.attention.rope_scaling", "LlamaForCausalLM has no fixed 'ntk' scaling"))
        if faults:
            raise FaultsError(faults)
        return cls(
            d_model=config.d_model,
            d_ff=config.d_ff,
            num_layers=config.num_blocks,
            num_heads=config.num_heads,
            num_kv_heads=options.get_kv_heads(config.num_heads),
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            norm_eps=config.layer_norm_eps,
            rope_theta=options.rope_theta,
            tied=config.tie_embeddings,
            head_width=options.head_width,
            bias=options.bias,
            rope_scaling=scaling,
            bos=config.bos_token_id,
            eos=tuple(dict.fromkeys((config.eos_token_id, *stop))),
            pad=config.pad_token_id,
        )


_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}
_FUSED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "ffn.up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
}
"""The weights of a block here, and those of transformers that are stacked in each."""


def from_theirs(shape: LlamaShape, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The model's state, from what `get` knows under transformers' names; float32, since it may be trained on."""
    import torch

    weights = {"embedding.weight": get("model.embed_tokens.weight"), "norm.weight": get("model.norm.weight")}
    if not shape.tied:
        weights["head.weight"] = get("lm_head.weight")
    for index in range(shape.num_layers):
        for ours, theirs in _FUSED.items():
            for kind in _kinds(shape, ours):
                parts = [get(f"model.layers.{index}.{name}.{kind}") for name in theirs]
                weights[f"blocks.{index}.{ours}.{kind}"] = torch.cat([part.float() for part in parts])
    return {name: weight.float() for name, weight in weights.items()}


def to_theirs(shape: LlamaShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state under transformers' names."""
    import torch

    queries, keys = shape.num_heads * shape.width, shape.num_kv_heads * shape.width
    sizes = {"attention.qkv": [queries, keys, keys], "ffn.up": [shape.d_ff, shape.d_ff]}
    result = {"model.embed_tokens.weight": weights["embedding.weight"], "model.norm.weight": weights["norm.weight"]}
    if not shape.tied:
        result["lm_head.weight"] = weights["head.weight"]
    for index in range(shape.num_layers):
        for ours, theirs in _FUSED.items():
            for kind in _kinds(shape, ours):
                weight = weights[f"blocks.{index}.{ours}.{kind}"]
                parts = torch.split(weight, sizes[ours]) if ours in sizes else (weight,)
                for name, part in zip(theirs, parts, strict=True):
                    result[f"model.layers.{index}.{name}.{kind}"] = part.contiguous()
        if shape.bias == "qkv":
            # There either all four products have biases, or none has.
            result[f"model.layers.{index}.self_attn.o_proj.bias"] = torch.zeros(shape.d_model)
    return result


def _positions(config: Mapping[str, object]) -> tuple[object, Mapping[str, object] | None]:
    """theta, and the scaling where it is not the identity; transformers 5 keeps both in rope_parameters."""
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if isinstance(given, Mapping):
            theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
            kind = given.get("rope_type", given.get("type", "default"))
            return theta, None if kind == "default" else given
    return config.get("rope_theta", 10000.0), None


def _window(config: Mapping[str, object], sizes: Mapping[str, int]) -> int | None:
    """The window that every layer has; None where none has one below the context.

    As in transformers, and with its values for keys that are missing: `layer_types` names each layer's attention; without it
    all layers of a mistral have the window, and those of a qwen2 from `max_window_layers` on, if `use_sliding_window`. A llama
    reads none of these keys. Raises `ValueError` where only some layers have it.
    """
    num_layers, qwen = sizes["num_layers"], config["model_type"] == "qwen2"
    window = None if config["model_type"] == "llama" else config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", not qwen) or not isinstance(window, int) or window >= sizes["max_seq_len"]:
        return None
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28) if qwen else 0
    if isinstance(kinds, list):
        windowed = kinds[:num_layers].count("sliding_attention")
    elif isinstance(first, int):
        windowed = min(max(num_layers - first, 0), num_layers)
    else:
        raise ValueError(f"max_window_layers: {first!r} is no whole number")
    if 0 < windowed < num_layers:
        raise ValueError(f"{window} in {windowed} of {num_layers} layers; here all layers have a window or none has")
    return window if windowed else None


def _kinds(shape: LlamaShape, ours: str) -> tuple[str, ...]:
    """What a layer holds."""
    biased = {"none": (), "qkv": ("attention.qkv",), "all": ("attention.qkv", "attention.out")}
    return ("weight", "bias") if ours in biased[shape.bias] else ("weight",)


_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
"""config.json's words and those of the option."""


def _scaling(given: Mapping[str, object], max_seq_len: int) -> dict[str, object]:
    """The option `rope_scaling`. Raises `ValueError` for a rule that is not one of ours."""
    kind = given.get("rope_type", given.get("type"))
    foreign = sorted(set(given) - {*_SCALING, "rope_type", "type", "rope_theta"})
    if kind not in ("linear", "llama3", "yarn") or foreign:
        what = f"{dict(given)!r} is not supported"
        raise ValueError(f"{what}; linear, llama3 and yarn are{f', without {foreign}' if foreign else ''}")
    options = {ours: given[theirs] for theirs, ours in _SCALING.items() if given.get(theirs) is not None}
    if kind == "linear":
        options.pop("original_max_seq_len", None)
    else:
        # transformers' rule where nothing is said: the context of the configuration is the one of before.
        options.setdefault("original_max_seq_len", max_seq_len)
    return {"type": kind, **options}


def _to_hf(scaling: Mapping[str, object]) -> dict[str, object]:
    """The option as config.json says it; `scaling` holds all values, and each rule is given its own."""
    own = {
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    kind = str(scaling["type"])
    words = {theirs: scaling[_SCALING[theirs]] for theirs in own[kind] if _SCALING[theirs] in scaling}
    return {"rope_type": kind, **words}


def read_ids(value: object) -> tuple[int, ...]:
    """What a configuration gives as one id, as a list of them, or not at all. Raises `ValueError` for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        if type(each) is not int:
            raise ValueError(f"{each!r} is no id")
    return tuple(ids)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids and ids[0] >= 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
