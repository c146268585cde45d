"""Both attentions inside a decoder: bf16, recomputed activations, compiled blocks, generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.core.config import APTConfig
from apt.inference.prepare import folded, prepare
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

ANY = [
    ("tva_default", {"r": 2, "num_kv_heads": 2, "window": 20, "qk_norm": True}),
    ("tva_default", {"rank": 4, "project": "last", "per_head": True, "bias": "all", "s": 2}),
    ("autopoietic", {"num_kv_heads": 2, "window": 20, "qk_norm": True}),
]


def make(name: str, options: dict[str, object]) -> Decoder:
    """A small decoder."""
    torch.manual_seed(0)
    config = APTConfig(
        vocab_size=300,
        d_model=32,
        num_heads=4,
        num_layers=2,
        d_ff=48,
        max_seq_len=64,
        dropout=0.0,
        attention_dropout=0.0,
        attention_name=name,
        options={"attention": options},  # type: ignore[dict-item]
    )
    return ModelBuilder(config).build_model()


TOKENS = torch.randint(0, 300, (2, 41), generator=torch.Generator().manual_seed(1))


def gradients(model: Decoder) -> list[Tensor]:
    """Of the loss by every parameter."""
    output = model(TOKENS[:, :-1])
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), TOKENS[:, 1:].flatten())
    return list(torch.autograd.grad(loss + sum(output.losses.values()), list(model.parameters())))


@pytest.mark.parametrize(("name", "options"), ANY)
def test_recomputed_activations_give_the_same_gradients(name: str, options: dict[str, object]) -> None:
    model = make(name, options)
    right = gradients(model)
    model.recompute = True
    torch.testing.assert_close(gradients(model), right)


@pytest.mark.parametrize(("name", "options"), ANY)
def test_under_bf16_autocast_gradients_are_near_those_of_float32(name: str, options: dict[str, object]) -> None:
    model = make(name, options)
    right = torch.cat([each.flatten() for each in gradients(model)])
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.cat([each.flatten() for each in gradients(model)])
    assert bool(low.isfinite().all())
    assert torch.nn.functional.cosine_similarity(low, right, dim=0) > 0.99


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's own
@pytest.mark.parametrize(("name", "options"), ANY)
def test_a_compiled_block_has_no_graph_break(name: str, options: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = make(name, options)
    right = gradients(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), right)


@pytest.mark.parametrize(("name", "options"), ANY)
def test_decoding_in_bf16_and_in_eight_bits_follows_float32(name: str, options: dict[str, object]) -> None:
    right = make(name, options).eval()(TOKENS).logits
    for dtype, quantize in (("bf16", None), ("fp32", "int8")):
        model = make(name, options)
        prepare(model, dtype=dtype, quantize=quantize)  # type: ignore[arg-type]
        assert not any(each.requires_grad for each in model.parameters())
        cache = model.create_cache(2)
        parts = [model(portion, cache=cache).logits for portion in TOKENS.split([30, 1, 10], 1)]
        seen = torch.cat(parts, 1).float()
        assert torch.nn.functional.cosine_similarity(seen.flatten(), right.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(("name", "options"), ANY)
def test_folded_for_a_while_the_model_says_the_same_and_is_not_changed(name: str, options: dict[str, object]) -> None:
    model = make(name, options).eval()
    layers, right = [block.attention for block in model.blocks], model(TOKENS).logits
    with folded(model), torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, right.detach(), atol=1e-5, rtol=1e-4)
        changed = [block.attention is not layer for block, layer in zip(model.blocks, layers, strict=True)]
    assert changed == [name == "tva_default"] * 2
    assert [block.attention for block in model.blocks] == layers
