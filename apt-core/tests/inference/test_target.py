"""Writing of an encoder-decoder: a source is projected once, whatever is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apt.core.profile import load_profile
from apt.inference.target import TargetContext
from apt.layers.cache import MemoryCache
from apt.modeling.compose import ModelBuilder
from apt.modeling.encoder_decoder import EncoderDecoder

SOURCES = [[5, 6, 7, 8, 9], [10, 11]]


PROFILE = """\
model:
  {architecture: encoder_decoder, num_encoder_layers: 1, num_decoder_layers: 2, d_model: 16, num_heads: 2, d_ff: 16,
   max_seq_len: 16, attention: sdpa}
training: {max_steps: 1, warmup_steps: 0}
data: {source: pairs, path: pairs.jsonl}
"""


@pytest.fixture
def model(tmp_path: Path) -> EncoderDecoder:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')
    profile = load_profile(tmp_path / "profile.yaml")
    torch.manual_seed(0)
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model().eval()
    assert isinstance(model, EncoderDecoder)
    return model


def test_a_source_is_projected_once_and_every_token_is_what_a_full_pass_gives(
    model: EncoderDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = TargetContext(model, SOURCES)
    projected: list[int] = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        projected.append(x.shape[1])
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    source = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
    target = [[model.bos], [model.bos]]
    for token in (3, 4, 12):
        projected.clear()
        scores = context.logits()
        # Two layers see the source's five tokens, at the first token of the target alone.
        assert projected.count(5) == (2 if len(target[0]) == 1 else 0)
        with torch.inference_mode():
            whole = model(torch.tensor(target), source).logits[:, -1]
        torch.testing.assert_close(scores, whole)
        context.add([token, token + 1])
        for row, each in zip(target, (token, token + 1), strict=True):
            row.append(each)


def test_another_memory_is_read_anew(model: EncoderDecoder) -> None:
    one, other = TargetContext(model, SOURCES[:1]), TargetContext(model, SOURCES[1:])
    assert not torch.equal(one.logits(), other.logits())


def test_samples_of_a_memory_are_reordered_and_it_is_not_cropped() -> None:
    cache = MemoryCache()
    cache.reorder(torch.tensor([0]))
    assert cache.length == 0
    cache.keep(torch.arange(6.0).view(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.kept is not None
    assert cache.kept[0].flatten().tolist() == [3, 4, 5, 3, 4, 5, 0, 1, 2]
    cache.crop(3)
    with pytest.raises(ValueError, match="a memory of 3 tokens cannot be cropped to 2"):
        cache.crop(2)


def test_a_layer_that_attends_across_refuses_another_layers_cache(model: EncoderDecoder) -> None:
    layer = model.blocks[0].cross
    x = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="a MemoryCache where it attends across, not a KVCache"):
        layer(x, causal=False, memory=x, cache=model.create_cache(1)[0])  # type: ignore[operator]
