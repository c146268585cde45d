"""The model as a whole: causal, tied, built without memory, and its parts known by their makers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.errors import ProfileError, ScheduleError, UserError
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import find_parts, set_active, set_value


@pytest.fixture
def builder(profile_file: Path) -> ModelBuilder:
    profile = load_profile(profile_file)
    return ModelBuilder(profile.config, resolved=profile.resolved)


@pytest.fixture
def model(builder: ModelBuilder) -> Decoder:
    torch.manual_seed(0)
    return builder.build_model().eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(seed))


def test_logits_are_causal(model: Decoder) -> None:
    right = model(tokens()).logits
    assert right.shape == (2, 12, 259)
    for t in range(1, 12):
        changed = torch.cat((tokens()[:, :t], tokens(t)[:, t:]), 1)
        assert torch.equal(model(changed).logits[:, :t], right[:, :t])


def test_a_block_adds_what_attention_and_ffn_make_of_its_normed_input(builder: ModelBuilder) -> None:
    torch.manual_seed(0)
    block = builder.build_block()
    for norm in (block.attention_norm, block.ffn_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = 3 * torch.randn(2, 5, 16) + 1
    y = x + block.attention(block.attention_norm(x), causal=True)
    torch.testing.assert_close(block(x).output, y + block.ffn(block.ffn_norm(y)))


def test_dropout_is_of_what_is_added_and_of_attention_s_weights(profile_file: Path) -> None:
    def build(*sets: str) -> ModelBuilder:
        loaded = load_profile(profile_file, sets=sets)
        return ModelBuilder(loaded.config, resolved=loaded.resolved)

    x = torch.randn(2, 5, 16)
    block = build("model.dropout=0.999999").build_block().train()
    assert torch.equal(block(x).output, x)
    assert not torch.equal(block.eval()(x).output, x)
    block = build("model.attention_dropout=0.5").build_block().train()
    assert not torch.equal(block(x).output, block(x).output)


def test_the_last_state_is_normed_before_the_head(model: Decoder) -> None:
    output = model(tokens())
    torch.testing.assert_close(output.hidden.mean(-1), torch.zeros(2, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.hidden.var(-1, correction=0), torch.ones(2, 12), atol=1e-2, rtol=0)
    torch.testing.assert_close(output.logits, output.hidden @ model.embedding.weight.T)


def test_reading_with_a_cache_is_reading_at_once(model: Decoder) -> None:
    cache = model.create_cache(2)
    parts = [model(each, cache=cache).logits for each in torch.split(tokens(), [5, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_changes_nothing(model: Decoder) -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :4] = False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens(), mask=mask, positions=positions).logits[:, 4:]
    torch.testing.assert_close(padded, model(tokens()[:, 4:]).logits, atol=1e-5, rtol=1e-5)


def test_the_head_shares_the_weights_of_the_embedding_or_has_its_own(builder: ModelBuilder) -> None:
    tied = builder.build_model()
    assert tied.head.weight is tied.embedding.weight
    free = ModelBuilder(builder.config.model_copy(update={"tie_embeddings": False})).build_model()
    assert free.head.weight is not free.embedding.weight
    assert free.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_on_the_meta_device_nothing_is_allocated(builder: ModelBuilder) -> None:
    with torch.device("meta"):
        model = builder.build_model()
    assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))


def test_parts_are_found_by_their_makers(model: Decoder) -> None:
    assert [(part.path, part.provider.get_name()) for part in find_parts(model)] == [
        ("blocks.0.attention", "sdpa"),
        ("blocks.0.ffn", "default"),
        ("blocks.1.attention", "sdpa"),
        ("blocks.1.ffn", "default"),
    ]


def test_a_value_that_no_part_has_is_an_error(model: Decoder) -> None:
    with pytest.raises(ScheduleError, match="route_temp: this model has no such value"):
        set_value(model, "route_temp", 1.0)
    set_active(model, "nobody", True)


def test_components_are_built_one_by_one_and_zero_counts_as_given(builder: ModelBuilder) -> None:
    assert builder.build_attention(dropout=0.0).dropout == 0.0
    assert builder.build_attention(d_model=32, num_heads=4, num_kv_heads=2).shape.num_kv_heads == 2
    assert builder.build_ffn(d_ff=8, name="swiglu").up.out_features == 16
    assert builder.build_ffn(bias=True).up.bias is not None
    assert builder.list_components()["ffn"][:1] == ["default"]
    with pytest.raises(UserError, match=r"num_kv_hads: no such option; did you mean 'num_kv_heads'"):
        builder.build_attention(num_kv_hads=2)


def test_a_provider_that_is_not_there_is_an_error_when_it_is_asked_for() -> None:
    with pytest.raises(ProfileError, match="no attention provider 'flash_v9' is installed"):
        ModelBuilder(APTConfig(attention_name="flash_v9")).build_model()


def test_a_batch_padded_on_the_left_goes_on_token_by_token_as_each_text_alone(builder: ModelBuilder) -> None:
    torch.manual_seed(0)
    config = builder.config.model_copy(update={"options": {"attention": {"window": 6, "num_kv_heads": 1}}})
    model = ModelBuilder(config).build_model().eval()
    prompts = [tokens()[0, :9].tolist(), tokens()[1, :4].tolist(), [7]]

    def go_on(texts: list[list[int]]) -> list[list[int]]:
        length = max(map(len, texts))
        read = torch.tensor([[0] * (length - len(text)) + text for text in texts])
        mask = torch.tensor([[False] * (length - len(text)) + [True] * len(text) for text in texts])
        cache, written = model.create_cache(len(texts)), []
        for _ in range(7):
            read = model(read, mask=mask, cache=cache).logits[:, -1:].argmax(-1)
            written.append(read)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return torch.cat(written, 1).tolist()

    with torch.no_grad():
        assert go_on(prompts) == [go_on([prompt])[0] for prompt in prompts]
