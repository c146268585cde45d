"""The builder: a profile and its providers become a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from apt.core.config import APTConfig, Choice
from apt.core.provider import Provider
from apt.core.providers import AlignProvider, AttentionProvider, FFNProvider, RetrievalProvider, RouterProvider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.core.resolution import record_of
from apt.core.resolve import Resolved, resolve_config
from apt.errors import ProviderBrokenError, UserError
from apt.modeling.block import TransformerBlock
from apt.modeling.encoder_decoder import EncoderDecoder
from apt.modeling.model import Decoder

P = TypeVar("P", bound=Provider)
T = TypeVar("T")

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class ModelBuilder:
    """Builds a profile's model, or its components one by one.

    What is not given comes from the profile; an explicit 0 is given. Further keyword arguments are options of the
    provider: they make a changed copy of it, validated anew.
    """

    def __init__(self, config: APTConfig, registry: Registry | None = None, resolved: Resolved | None = None) -> None:
        self.config = config
        self.registry = installed if registry is None else registry
        self._resolved = resolved

    @property
    def resolved(self) -> Resolved:
        """The profile's providers; raises `ProfileError` where they cannot be had."""
        if self._resolved is None:
            self._resolved = resolve_config(self.config, self.registry)
        return self._resolved

    def list_components(self) -> dict[str, list[str]]:
        """Kind -> the providers that could be built."""
        return self.registry.list_providers()

    def build_attention(
        self,
        d_model: int | None = None,
        num_heads: int | None = None,
        dropout: float | None = None,
        name: str | None = None,
        **options: object,
    ) -> nn.Module:
        """An attention layer."""
        provider = self._provider("attention", AttentionProvider, name, options)
        config = self.config
        layer = provider.create_layer(
            _given(d_model, config.d_model),
            _given(num_heads, config.num_heads),
            _given(dropout, config.attention_dropout),
        )
        return _module(layer, provider)

    def build_ffn(
        self,
        d_model: int | None = None,
        d_ff: int | None = None,
        dropout: float | None = None,
        activation: str | None = None,
        name: str | None = None,
        *,
        index: int | None = None,
        **options: object,
    ) -> nn.Module:
        """A feed-forward layer, the one of block `index` where blocks differ.

        The block drops its output; `dropout` here is the layer's own, 0 unless given.
        """
        provider = self._provider("ffn", FFNProvider, name, options)
        if index is not None:
            provider = provider.at_layer(index, self.config.num_encoder_blocks + self.config.num_blocks)
        layer = provider.create_layer(
            _given(d_model, self.config.d_model),
            _given(d_ff, self.config.d_ff),
            _given(dropout, 0.0),
            _given(activation, self.config.activation),
        )
        return _module(layer, provider)

    def build_router(
        self,
        d_model: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        name: str | None = None,
        **options: object,
    ) -> nn.Module:
        """A router; without `num_experts`, for as many as the profile's ffn has."""
        ffn = self.config.get_provider_config("ffn")
        nested = ffn.get("router")
        if name is None and isinstance(nested, Mapping):
            chosen = {key: value for key, value in nested.items() if key != "provider"}
            options = {**chosen, **options}
        provider = self._provider("router", RouterProvider, _given(name, self.config.router_name), options)
        experts = _given(num_experts, ffn.get("experts"))
        if not isinstance(experts, int):
            raise UserError("build_router: num_experts is not given, and the profile's ffn has no experts")
        return _module(
            provider.create_router(_given(d_model, self.config.d_model), experts, _given(top_k, provider.top_k)),
            provider,
        )

    def build_aligner(
        self,
        d_model: int | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        name: str | None = None,
        **options: object,
    ) -> nn.Module:
        """An aligner; `alpha` and `beta` are the provider's own where it has such options."""
        provider = self._provider("align", AlignProvider, name, options)
        weights = {
            key: _given(value, getattr(provider, key, None)) for key, value in (("alpha", alpha), ("beta", beta))
        }
        given = {key: value for key, value in weights.items() if value is not None}
        return _module(provider.create_aligner(_given(d_model, self.config.d_model), **given), provider)

    def build_retriever(
        self, d_model: int | None = None, top_k: int | None = None, name: str | None = None, **options: object
    ) -> object:
        """A retriever."""
        provider = self._provider("retrieval", RetrievalProvider, name, options)
        count = _given(top_k, getattr(provider, "top_k", 5))
        return provider.create_retriever(_given(d_model, self.config.d_model), count)

    def build_block(self, index: int | None = None, *, causal: bool = True, cross: bool = False) -> TransformerBlock:
        """One block of the profile, number `index` where blocks differ; not `causal` an encoder's, with `cross` one that looks
        at a memory too."""
        attention, ffn = self.build_attention(), self.build_ffn(index=index)
        return TransformerBlock(
            attention,
            ffn,
            self._norm(),
            self._norm(),
            self.config.dropout,
            causal=causal,
            cross=self.build_attention() if cross else None,
            cross_norm=self._norm() if cross else None,
        )

    def build_model(self) -> Decoder:
        """The profile's model, with everything that it will ever switch on.

        Under ``torch.device("meta")`` nothing is allocated.
        """
        config = self.config
        attention = self._provider("attention", AttentionProvider, None, {})
        if config.architecture == "encoder_decoder":
            encoders = config.num_encoder_blocks
            return EncoderDecoder(
                _table(config.vocab_size, config.d_model),
                [self.build_block(index, causal=False) for index in range(encoders)],
                [self.build_block(encoders + index, cross=True) for index in range(config.num_blocks)],
                self._norm(),
                self._norm(),
                dropout=config.dropout,
                max_seq_len=config.max_seq_len,
                tie_embeddings=config.tie_embeddings,
                pad=config.pad_token_id,
                bos=config.bos_token_id,
                position_table=_table(config.max_seq_len, config.d_model) if attention.needs_position_table() else None,
            )
        return Decoder(
            _table(config.vocab_size, config.d_model),
            [self.build_block(index) for index in range(config.num_blocks)],
            self._norm(),
            dropout=config.dropout,
            max_seq_len=config.max_seq_len,
            tie_embeddings=config.tie_embeddings,
            position_table=_table(config.max_seq_len, config.d_model) if attention.needs_position_table() else None,
            aligner=self.build_aligner() if "align" in self.resolved.providers else None,
        )

    def _norm(self) -> nn.Module:
        return NORMS[self.config.norm](self.config.d_model, eps=self.config.layer_norm_eps)

    def _provider(self, kind: str, interface: type[P], name: str | None, options: Mapping[str, object]) -> P:
        """The profile's provider of this kind, or the named one, with these options changed."""
        resolved = self.resolved.providers.get(kind)
        if name is None and not options and isinstance(resolved, interface):
            return resolved
        fallback: tuple[str, ...] = ()
        if name is None:
            asked = self.config.choice(kind)
            name, fallback, options = asked.provider, asked.fallback, {**asked.options, **options}
        # Not validated: from Python an option may be a provider, which is no JSON value.
        choice = Choice.model_construct(provider=name, fallback=fallback, options=dict(options))
        provider = self.registry.resolve(kind, choice).provider
        if not isinstance(provider, interface):
            raise TypeError(f"{kind}.{choice.provider} is not a {interface.__name__}")
        return provider


def _table(rows: int, width: int) -> nn.Embedding:
    """Learned vectors, drawn with deviation 0.02 (Radford et al. 2018, GPT, section 4.1)."""
    table = nn.Embedding(rows, width)
    with torch.no_grad():
        nn.init.normal_(table.weight, std=0.02)
    return table


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _module(layer: object, provider: Provider) -> nn.Module:
    if not isinstance(layer, nn.Module):
        message = f"{record_of(provider)} made a {type(layer).__name__}, not an nn.Module"
        raise ProviderBrokenError(provider.kind, provider.get_name(), message)
    return layer
