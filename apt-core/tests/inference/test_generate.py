"""Generation: what was asked for, from the seed alone, beyond the context too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apt.builtin.tokenizer import ByteTokenizer
from apt.core.profile import load_profile
from apt.errors import UserError
from apt.inference.generate import generate
from apt.inference.sampling import Sampling
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

TOKENIZER = ByteTokenizer()


@pytest.fixture
def model(profile_file: Path) -> Decoder:
    profile = load_profile(profile_file)
    torch.manual_seed(0)
    return ModelBuilder(profile.config, resolved=profile.resolved).build_model()


def likeliest(model: Decoder, text: str, count: int) -> list[int]:
    """Greedy text, the whole context read again for each token."""
    model.eval()
    context, written = [1, *TOKENIZER.encode(text)], []
    for _ in range(count):
        token = int(model(torch.tensor([context])).logits[0, -1].argmax())
        if token in (1, 2):
            break
        written.append(token)
        context.append(token)
        if len(context) > model.max_seq_len:
            context = context[-(model.max_seq_len // 2) :]
    return written


def test_greedy_text_with_the_cache_is_that_without(model: Decoder) -> None:
    for count in (5, 40):
        assert list(generate(model, TOKENIZER, "def", max_new_tokens=count, temperature=0).tokens) == likeliest(
            model, "def", count
        )


def test_attention_without_a_cache_writes_the_same(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate(model, TOKENIZER, "def", max_new_tokens=12, temperature=0).tokens
    monkeypatch.setattr(Decoder, "supports_kv_cache", property(lambda self: False))
    assert generate(model, TOKENIZER, "def", max_new_tokens=12, temperature=0).tokens == right


def test_the_seed_decides_and_no_other_random_state_is_touched(model: Decoder) -> None:
    state = torch.get_rng_state()
    texts = [generate(model, TOKENIZER, "x", max_new_tokens=20, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_pieces_are_shown_as_they_come_and_make_up_the_text(model: Decoder) -> None:
    pieces: list[str] = []
    result = generate(model, TOKENIZER, "é", max_new_tokens=30, seed=3, show=pieces.append)
    assert "".join(pieces) == result.text
    assert len(result.tokens) <= 30


def test_a_prompt_longer_than_the_context_says_what_was_left_out(model: Decoder) -> None:
    result = generate(model, TOKENIZER, "x" * 50, max_new_tokens=3)
    assert result.left_out == 51 - model.max_seq_len
    assert generate(model, TOKENIZER, "", max_new_tokens=0).text == ""


def test_sampling_keeps_to_its_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(**limits: object) -> set[int]:
        return {int(Sampling(**limits).draw(logits, generator)) for _ in range(200)}  # type: ignore[arg-type]

    assert drawn() == {0, 1, 2, 3}
    assert drawn(temperature=0) == {0}
    for nearly in (1e-30, 1e-40, 5e-324):
        assert drawn(temperature=nearly) == {0}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=9) == {0, 1, 2, 3}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=1e-9) == {0}
    assert drawn(top_p=1e-50) == {0}


def test_temperature_and_the_limits_shape_the_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def shares(**options: float) -> torch.Tensor:
        drawn = Sampling(**options).draw(logits.expand(20000, 4), generator)  # type: ignore[arg-type]
        return drawn.flatten().bincount(minlength=4) / len(drawn)

    for temperature in (0.5, 1.0, 2.0):
        right = (logits[0] / temperature).softmax(-1)
        torch.testing.assert_close(shares(temperature=temperature), right, atol=0.02, rtol=0)
    kept = torch.tensor([0.5, 0.3, 0, 0]) / 0.8
    torch.testing.assert_close(shares(top_p=0.6), kept, atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_k=2), kept, atol=0.02, rtol=0)
    # Heat comes first: at temperature 2 the two likeliest hold 0.65, and three are needed for 0.7.
    assert shares(temperature=2.0, top_p=0.7)[2] > 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_whose_scores_are_no_numbers_is_refused(model: Decoder, temperature: float) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the scores of the next token are no finite numbers"):
        generate(model, TOKENIZER, "x", temperature=temperature)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: -1 is not allowed; 0 or more"),
        ({"seed": -1}, "seed: -1 is not allowed; from 0"),
        ({"seed": 2**70}, "seed: 1180591620717411303424 is not allowed"),
        ({"prompt": "a\udcff"}, r"the prompt holds '\\udcff', half of a character; write it in UTF-8"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(model: Decoder, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, TOKENIZER, **({"prompt": "x"} | asked))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"temperature": -1}, "temperature: -1 is not allowed; 0 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k: 0 is not allowed; 1 or more"),
        ({"top_p": 0}, "top_p: 0 is not allowed; more than 0, up to 1"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**limits)  # type: ignore[arg-type]
