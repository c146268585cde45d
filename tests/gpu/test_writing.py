"""On a GPU a model writes as it should: with a cache as without, in a batch as alone, compiled as not."""

from __future__ import annotations

import pytest
import torch

from apt.core.profile import load_profile
from apt.inference.generate import generate, generate_batch
from apt.inference.prepare import prepare
from apt.inference.sampling import Sampling
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and to be asked for: pytest tests/gpu"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(
        "ignore:.*TensorFloat32 tensor cores", "ignore:.*torch._inductor", "ignore:.*Online softmax"
    ),
]
ATTENTIONS = [
    "sdpa",
    "{provider: sdpa, num_kv_heads: 2, window: 9, sinks: true}",
    "flex",
    "{provider: tva_default, r: 2}",
    "autopoietic",
]


class Letters:
    """A tokenizer of characters."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return [ord(each) % 256 for each in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def build(profile: str, attention: str) -> Decoder:
    torch.manual_seed(0)
    loaded = load_profile(profile, sets=[f"model.attention={attention}"])
    return ModelBuilder(loaded.config, resolved=loaded.resolved).build_model().cuda().eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cached_writing_on_a_gpu_gives_the_scores_of_reading_the_whole_text(profile: str, attention: str) -> None:
    model = build(profile, attention)
    tokens = torch.randint(0, 250, (2, 40), device="cuda")
    with torch.inference_mode():
        whole = model(tokens).logits
        cache = model.create_cache(2)
        parts = [model(part, cache=cache).logits for part in tokens.split([20, *[1] * 20], 1)]
        bare = model.cpu()(tokens.cpu()).logits
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
    assert (whole.cpu() - bare).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_with_padding_on_the_left_writes_on_a_gpu_what_each_prompt_alone_does(
    profile: str, attention: str, temperature: float
) -> None:
    model, prompts = build(profile, attention), ["def f(x):", "x", "    return x + 1\n"]
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    together = generate_batch(model, Letters(), prompts, **options)  # type: ignore[arg-type]
    alone = [generate(model, Letters(), prompt, **options) for prompt in prompts]  # type: ignore[arg-type]
    assert [each.tokens for each in together] == [each.tokens for each in alone]


def test_top_k_and_top_p_draw_on_a_gpu_what_they_may_and_touch_no_other_random_state() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]], device="cuda")
    before = torch.cuda.get_rng_state()
    generator = torch.Generator("cuda").manual_seed(0)
    for sampling in (Sampling(1.0, 2), Sampling(1.0, None, 0.8), Sampling(1.0, 3, 0.7)):
        assert {int(sampling.draw(logits, generator)) for _ in range(30)} <= {1, 2}
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("attention", ["sdpa", "{provider: tva_default, r: 2}"])
def test_compiled_writing_on_a_gpu_writes_what_it_does_otherwise(profile: str, attention: str) -> None:
    model = build(profile, attention)
    plain = generate(model, Letters(), "def f(", max_new_tokens=24, temperature=0.0)  # type: ignore[arg-type]
    prepare(model, compiled=True)
    compiled = generate(model, Letters(), "def f(", max_new_tokens=24, temperature=0.0)  # type: ignore[arg-type]
    assert compiled.tokens == plain.tokens


def test_bf16_writes_on_a_gpu(profile: str) -> None:
    model = build(profile, "sdpa")
    prepare(model, dtype="bf16")
    assert len(generate(model, Letters(), "def f(", max_new_tokens=8).tokens) <= 8  # type: ignore[arg-type]
