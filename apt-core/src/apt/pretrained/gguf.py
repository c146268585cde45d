"""GGUF files, as llama.cpp writes them: dequantised weights, with rotary rows put back, and the tokenizer built anew.

llama.cpp turns neighbouring features (2i, 2i + 1) of a llama, here and in transformers it is (i, i + width / 2); its converter
permutes the rows of W_q and W_k, and of their biases, to match, and here they are permuted back. A qwen2 it turns as we do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.builtin.pretrained import PretrainedTokenizer
from apt.errors import AptError, Fault, FaultsError, UserError
from apt.pretrained.gguf_tokenizer import LLAMA3, WORDS, build_tokenizer
from apt.pretrained.llama import LlamaShape
from apt.pretrained.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>")
"""Control tokens that end a text wherever a vocabulary has them, as llama.cpp holds it too."""
_SCALING = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""GGUF's words for scaled positions, and those of config.json."""
_USUAL = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
"""The ids that llama.cpp takes for SentencePiece's special tokens where a file does not say."""
CONTROL = 3
"""A token's type in GGUF: it is no text."""


def open_gguf(path: Path) -> Source:
    """A file of the Llama family. Raises `UserError` where it is not one, or the package `gguf` is missing."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UserError("GGUF files are read by the package gguf: pip install 'apt-core[gguf]'") from error
    import torch

    with _reading(path):
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields.get("tokenizer.ggml.model") == "llama":
            fields = {**_USUAL, **fields}
        tensors = {_rename(tensor.name): tensor for tensor in reader.tensors}
        shape = _shape(fields, str(path), tensors)
        tokenizer, add_bos = _tokenizer(fields, path)
    if "rope_freqs.weight" in tensors:
        raise FaultsError([Fault(f"{path}: rope_freqs.weight", "scaled positions are not supported")])

    def get(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"{path}: has no tensor {name}, which a Llama has")
        found = tensors[name]
        with _reading(path):
            weight = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
            for part, heads in (("q_proj", shape.num_heads), ("k_proj", shape.num_kv_heads)):
                if part in name and fields["general.architecture"] != "qwen2":
                    # [heads, width / 2, 2, ...] holds the pairs side by side; we want all first ones, then all second.
                    weight = weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        return weight

    return Source(str(fields.get("general.name", path.stem)), shape, tokenizer, add_bos, frozenset(tensors), get)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is read of a file that was cut short or damaged may end in any error; it becomes a `UserError`."""
    try:
        yield
    except (AptError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{path}: is not a GGUF file, or not a whole one: {error}") from error


def _rename(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    if name.startswith("blk."):
        _, index, part, *rest = name.split(".")
        if part in _BLOCK:
            return ".".join(("model.layers", index, _BLOCK[part], *rest))
    return name


def _shape(fields: Mapping[str, Any], where: str, tensors: Mapping[str, Any]) -> LlamaShape:
    """The shape, by way of what config.json would say."""
    family = str(fields.get("general.architecture"))

    def of(key: str) -> Any:
        return fields.get(f"{family}.{key}")

    embedding = tensors.get("model.embed_tokens.weight")
    config = {
        "model_type": family,
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"),
        "vocab_size": None if embedding is None else int(embedding.shape[-1]),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": round(float(of("attention.layer_norm_rms_epsilon") or 1e-6), 12),
        "rope_theta": of("rope.freq_base") or 10000.0,
        "rope_scaling": _scaling(fields, family),
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in tensors,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    shape = LlamaShape.from_hf({key: value for key, value in config.items() if value is not None}, where)
    turned = of("rope.dimension_count")
    if turned not in (None, shape.width):
        part = f"{turned} of a head's {shape.width} features are turned; here all are"
        raise FaultsError([Fault(f"{where}: {family}.rope.dimension_count", part)])
    tokens: Sequence[str] = fields.get("tokenizer.ggml.tokens", ())
    types: Sequence[int] = fields.get("tokenizer.ggml.token_type", ())
    ends = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == CONTROL and token in _ENDS
    ]
    return replace(shape, eos=tuple(dict.fromkeys((*shape.eos, *ends))))


def _scaling(fields: Mapping[str, Any], family: str) -> dict[str, object] | None:
    """What config.json would say of scaled positions; None where they are as they are. What has no word there keeps its own."""
    start = f"{family}.rope.scaling."
    given = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
    given.pop("finetuned", None)  # how the model was trained, which changes nothing
    kind = given.pop("type", "linear")
    factor = given.pop("factor", fields.get(f"{family}.rope.scale_linear"))
    if kind == "none" or not factor:
        return None
    return {"type": kind, "factor": factor, **{_SCALING.get(key, key): value for key, value in given.items()}}


def _tokenizer(fields: Mapping[str, Any], path: Path) -> tuple[PretrainedTokenizer, bool]:
    """The tokenizer, and whether a text starts with bos (llama.cpp's defaults: yes for SentencePiece's and Llama 3's)."""
    usual = fields.get("tokenizer.ggml.model") == "llama" or WORDS.get(fields.get("tokenizer.ggml.pre", "")) == LLAMA3
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", usual))
    tokens: Sequence[str] = fields.get("tokenizer.ggml.tokens", ())
    settings: dict[str, object] = {"add_bos_token": add_bos}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            settings[f"{role}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return PretrainedTokenizer(build_tokenizer(fields, str(path)), settings), add_bos


__all__ = ["open_gguf"]
