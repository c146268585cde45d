"""Batches: every row is what it would be alone, whatever stands beside it and however long it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.builtin.tokenizer import ByteTokenizer
from apt.core.profile import load_profile
from apt.core.special import SpecialIds
from apt.inference.context import Context
from apt.inference.generate import generate, generate_batch
from apt.inference.recorded import RecordedStep, Slots
from apt.inference.stream import TextStream
from apt.layers import LayerCache
from apt.layers.cache import KVCache
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

TOKENIZER = ByteTokenizer()


@pytest.fixture
def model(profile_file: Path) -> Decoder:
    profile = load_profile(profile_file)
    torch.manual_seed(0)
    return ModelBuilder(profile.config, resolved=profile.resolved).build_model()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_rows_of_a_batch_are_what_each_prompt_gives_alone(
    model: Decoder, temperature: float, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "supports_kv_cache", property(lambda self: cached))
    prompts = ["a", "def f(x", "", "a prompt that is longer than the context", "def f(y"]
    # Beyond the context of 16 tokens: rows are read anew at different times.
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
    # Half of all ids end a text, so rows end at different times.
    for special in (SpecialIds(), SpecialIds(stop=frozenset(range(0, 259, 40)))):
        together = generate_batch(model, TOKENIZER, prompts, special=special, **options)  # type: ignore[arg-type]
        alone = [generate(model, TOKENIZER, prompt, special=special, **options) for prompt in prompts]  # type: ignore[arg-type]
        assert together == alone
    assert generate_batch(model, TOKENIZER, []) == []


def test_a_text_of_many_contexts_takes_no_more_memory_than_one(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    create = Decoder.create_cache

    def counted(self: Decoder, batch: int, max_seq_len: int | None = None) -> object:
        rooms.append(max_seq_len or 0)
        return create(self, batch, max_seq_len)

    monkeypatch.setattr(Decoder, "create_cache", counted)
    result = generate(model, TOKENIZER, "x", max_new_tokens=300, seed=1, special=SpecialIds(stop=frozenset()))
    assert len(result.tokens) == 300
    assert max(rooms) == model.max_seq_len
    rooms.clear()
    generate(model, TOKENIZER, "x", max_new_tokens=5)
    assert rooms == [7]


def test_with_a_window_a_long_text_takes_the_memory_of_the_window(
    profile_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(profile_file, sets=["model.attention.window=4"])
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model()
    caches: list[KVCache] = []
    create = Decoder.create_cache

    def kept(self: Decoder, batch: int, max_seq_len: int | None = None) -> list[LayerCache]:
        made = create(self, batch, max_seq_len)
        caches.extend(each for each in made if isinstance(each, KVCache))
        return made

    monkeypatch.setattr(Decoder, "create_cache", kept)
    options = {"max_new_tokens": 300, "temperature": 0, "special": SpecialIds(stop=frozenset())}
    result = generate(model, TOKENIZER, "x", **options)  # type: ignore[arg-type]
    assert len(result.tokens) == 300
    assert caches
    assert {tuple(each.k.shape) for each in caches} == {(1, 2, 4, model.embedding.embedding_dim // 2)}
    assert max(each.length for each in caches) == model.max_seq_len


@given(st.text())
@settings(max_examples=60)
def test_the_pieces_of_a_stream_are_the_text(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text)]
    assert "".join((*pieces, stream.end())) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) or "\N{REPLACEMENT CHARACTER}" in text


def test_bytes_that_are_no_text_are_shown_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.add(token) for token in (3 + 0xE2, 3 + 0x82)] == ["", ""]
    assert stream.end() == TOKENIZER.decode([3 + 0xE2, 3 + 0x82])


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_step_over_the_whole_cache_scores_as_one_over_what_was_read(
    profile_file: Path, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(profile_file, sets=[f"model.attention.positions={positions}"])
    torch.manual_seed(0)
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model().eval()
    taken: list[int] = []
    step = RecordedStep.__call__

    def counted(self: RecordedStep, tokens: torch.Tensor) -> torch.Tensor:
        taken.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(RecordedStep, "__call__", counted)
    for texts in ([[5, 6, 7]], [[5, 6, 7], [9], [8, 7]]):
        plain = Context(model, texts, 40)
        # As on a GPU, but for the recording.
        monkeypatch.setattr(RecordedStep, "is_worth_it", lambda model: True)
        recorded = Context(model, texts, 40)
        monkeypatch.undo()
        monkeypatch.setattr(RecordedStep, "__call__", counted)
        # Beyond the context of 16 tokens, where the texts are read anew.
        for number in range(30):
            torch.testing.assert_close(recorded.logits(), plain.logits(), atol=1e-5, rtol=1e-4)
            tokens = [10 + number + row for row in range(len(texts))]
            plain.add(tokens)
            recorded.add(tokens)
    assert len(taken) > 40


def test_a_step_over_the_whole_cache_that_scores_otherwise_is_not_taken(
    profile_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile(profile_file)
    torch.manual_seed(0)
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model().eval()
    plain = Context(model, [[5, 6, 7]], 40)
    monkeypatch.setattr(RecordedStep, "is_worth_it", lambda model: True)
    # As a layer that looks at no mask but its own: it sees what is not written yet.
    seeing = Slots.append
    monkeypatch.setattr(Slots, "append", lambda self, k, v, mask=None: (*seeing(self, k, v, mask)[:2], None))
    recorded = Context(model, [[5, 6, 7]], 40)
    torch.testing.assert_close(recorded.logits(), plain.logits())
    for context in (plain, recorded):
        context.add([10])
    with pytest.warns(UserWarning, match="recorded it gives other scores"):
        first = recorded.logits()
    torch.testing.assert_close(first, plain.logits())
    for number in range(9):
        for context in (plain, recorded):
            context.add([11 + number])
        torch.testing.assert_close(recorded.logits(), plain.logits())
