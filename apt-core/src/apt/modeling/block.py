"""One transformer block, pre-norm: x + drop(attn(norm(x))), then x + drop(ffn(norm(x)))."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache, Part, as_part


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each behind its norm (Xiong et al. 2020, arXiv:2002.04745, figure 1b)."""

    def __init__(
        self, attention: nn.Module, ffn: nn.Module, attention_norm: nn.Module, ffn_norm: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        cache: LayerCache | None = None,
        tokens: Int[Tensor, "batch seq"] | None = None,
    ) -> Part:
        """`mask` is True for tokens that are there; with a `cache` it covers the earlier ones too.

        `tokens` are the ids, for a feed-forward layer that asks for them.
        """
        attended = as_part(self.attention(self.attention_norm(x), mask=mask, positions=positions, cache=cache))
        x = x + self.dropout(attended.output)
        here = None if mask is None else mask[:, -x.shape[1] :]
        asked = {"tokens": tokens} if getattr(self.ffn, "takes_tokens", False) else {}
        mapped = as_part(self.ffn(self.ffn_norm(x), mask=here, **asked))
        losses = {**attended.losses, **mapped.losses}
        metrics = {**attended.metrics, **mapped.metrics}
        if len(losses) < len(attended.losses) + len(mapped.losses):
            raise ValueError(
                f"attention and ffn both return a loss called {sorted(set(attended.losses) & set(mapped.losses))}"
            )
        return Part(x + self.dropout(mapped.output), losses, metrics)
