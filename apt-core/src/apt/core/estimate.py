"""What a profile's model will cost, before it is built: parameters, arithmetic, memory, cache. No PyTorch is needed.

The sums stand on what providers say of their own parts; the test kit holds each of them to within 10 % of what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from apt.core.config import APTConfig
from apt.core.providers import AlignProvider, AttentionProvider, FFNProvider
from apt.core.resolve import Resolved

BYTES = 4
"""Weights, gradients, moments and float32 activations are four bytes a number."""


@dataclass(frozen=True)
class PartCost:
    """One kind of part, all layers of it together."""

    part: str
    provider: str
    count: int
    parameters: int
    active: int
    flops_per_token: float


@dataclass(frozen=True)
class Estimate:
    """Numbers of one model, everything switched on. Memory is in bytes, for one process without sharding."""

    parts: tuple[PartCost, ...]
    weights: int
    gradients: int
    optimizer: int
    """Two moments a parameter; one for the matrices that Muon trains."""
    averages: int
    """Copies of the weights that alignment keeps, such as their average; checkpoints hold them too."""
    set_aside: int
    """The model's own weights while the averaged ones teach: where ranks split them, those stand in their place."""
    activations: int
    dropped_scores: int
    """What attention dropout adds to them on a CPU, whose fused kernel drops no weights: there the weights are written out."""
    cache_per_token: int
    step_cost: float
    """A training step with alignment on, in steps without it."""
    extra_passes: tuple[int, int]
    """Forward and backward passes that alignment adds to a training step."""
    recomputed: bool
    """Whether each backward pass makes the forward pass once more (`training.recompute`)."""

    @property
    def parameters(self) -> int:
        """All trainable parameters, what is inert and what rests included."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        return sum(part.active for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Forward, at full context; the causal half is not deducted."""
        return sum(part.flops_per_token for part in self.parts)

    @property
    def training_flops(self) -> tuple[float, float]:
        """Of a training step, a token: without alignment, about three or four times those of a forward pass, and with it."""
        again = (int(self.recomputed), self.recomputed * (1 + self.extra_passes[1]))
        return (3 + again[0]) * self.flops_per_token, (3 * self.step_cost + again[1]) * self.flops_per_token

    @property
    def training_memory(self) -> int:
        """The peak of a training step, beside what PyTorch itself takes."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.set_aside + self.activations


def estimate(config: APTConfig, resolved: Resolved) -> Estimate:
    """The cost of a profile's model and of one training step with its batch size."""
    attention, ffn = resolved.providers["attention"], resolved.providers["ffn"]
    align = resolved.providers.get("align")
    assert isinstance(attention, AttentionProvider)
    assert isinstance(ffn, FFNProvider)
    width, length = config.d_model, config.max_seq_len
    # Decoder blocks that look at an encoder attend twice and have a norm more. Operations are those of one token of the target
    # and one of the source together.
    across = config.num_blocks if config.num_encoder_blocks else 0
    blocks = config.num_encoder_blocks + config.num_blocks
    attentions, norms = blocks + across, 2 * blocks + across + 1 + bool(across)
    ffns = [ffn.at_layer(index, blocks) for index in range(blocks)]
    norm = width * (2 if config.norm == "layernorm" else 1)
    vocabulary = config.vocab_size * width
    attention_size = attentions * attention.get_parameter_count(width, config.num_heads)
    parts = [
        PartCost("embedding", "", 1, vocabulary, 0 if config.tie_embeddings else width, 0.0),  # a row of the head then
        *(
            [PartCost("positions", "learned", 1, length * width, width, 0.0)]
            if attention.needs_position_table()
            else []
        ),
        PartCost(
            "attention",
            attention.get_name(),
            attentions,
            attention_size,
            attention_size,
            attentions * attention.get_flops_estimate(length, width, config.num_heads) / length,
        ),
        PartCost(
            "ffn",
            ffn.get_name(),
            blocks,
            sum(each.get_parameter_count(width, config.d_ff) for each in ffns),
            sum(each.get_active_parameter_count(width, config.d_ff) for each in ffns),
            sum(each.get_flops_estimate(length, width, config.d_ff) for each in ffns) / length,
        ),
        PartCost("norms", config.norm, norms, norms * norm, norms * norm, 0.0),
        PartCost(
            "head",
            "tied to the embedding" if config.tie_embeddings else "",
            1,
            0 if config.tie_embeddings else vocabulary,
            vocabulary,
            2.0 * vocabulary,
        ),
    ]
    if isinstance(align, AlignProvider):
        size = align.get_parameter_count(width)
        parts.append(PartCost("align", align.get_name(), 1, size, size, 2.0 * size))
    parameters = sum(part.parameters for part in parts)
    step_cost, extra_passes, copies = 1.0, (0, 0), 0
    if isinstance(align, AlignProvider):
        step_cost, extra_passes = align.get_step_cost(), align.get_extra_passes()
        copies = align.get_weight_copies()
    kept_passes = 1 + extra_passes[1]
    stacked = sum(each.get_stacked_parameter_count(width, config.d_ff) for each in ffns)
    split = stacked if config.hardware.expert_parallel > 1 else 0
    if config.hardware.parallel == "fsdp":
        split = parameters
    teaches = copies and extra_passes[0] > extra_passes[1]  # in a pass that nothing is learnt from
    activations = _activations(config, attention, ffns)
    scores = config.num_heads * length**2 * config.training.batch_size
    # Weights, what drops some of them, and what is left.
    written = 3 * BYTES * scores if config.attention_dropout and attention.supports_dropout() else 0
    matrices = 0
    if config.training.optimizer == "muon":
        matrices = sum(part.parameters for part in parts if part.part in ("attention", "ffn")) - stacked
    return Estimate(
        parts=tuple(parts),
        weights=BYTES * parameters,
        gradients=BYTES * parameters,
        optimizer=BYTES * (2 * parameters - matrices),
        averages=BYTES * copies * parameters,
        set_aside=BYTES * split if teaches else 0,
        activations=kept_passes * activations,
        dropped_scores=kept_passes * (_activations(config, attention, ffns, written) - activations),
        cache_per_token=BYTES * config.num_blocks * attention.get_cache_size(width, config.num_heads),
        step_cost=step_cost,
        extra_passes=extra_passes,
        recomputed=config.training.recompute,
    )


def _activations(config: APTConfig, attention: AttentionProvider, ffns: list[FFNProvider], written: int = 0) -> int:
    """Bytes that one training forward keeps for its backward pass, and the logits' gradient.

    Of blocks that are computed anew their inputs are kept, and beside them the head's share, or that of one block in its turn.
    `written` are bytes that each attention layer keeps beside what its provider says.
    """
    batch, length, width = config.training.batch_size, config.max_seq_len, config.d_model
    tokens = batch * length
    norm = BYTES * tokens * (width + 2)  # its input, and each row's mean and deviation
    dropped = tokens * width * (config.dropout > 0)  # a mask of a byte each
    attended = attention.get_memory_estimate(length, width, config.num_heads, batch) + written
    block = attended + 2 * (norm + dropped)
    mapped = [each.get_memory_estimate(length, width, config.d_ff, batch) for each in ffns]
    # log_softmax keeps one copy of the logits; its backward makes another.
    head = norm + BYTES * tokens * width + 2 * BYTES * tokens * config.vocab_size
    across, encoder_end = (attended + norm + dropped, norm + dropped) if config.num_encoder_blocks else (0, 0)
    if config.training.recompute:
        inputs = BYTES * tokens * width * len(ffns)
        return inputs + max(head + dropped + encoder_end, block + across + max(mapped))
    blocks = len(ffns) * block + config.num_blocks * across + sum(mapped)
    return encoder_end + blocks + head + dropped
