"""An encoder-decoder learns what only its source can tell, and costs what was foretold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from apt.core.estimate import estimate
from apt.core.profile import Profile, load_profile
from apt.errors import DataError, ProfileError
from apt.inference.generate import generate, generate_batch
from apt.modeling.compose import ModelBuilder
from apt.modeling.encoder_decoder import EncoderDecoder
from apt.testing.measure import count_flops
from apt.training.checkpoint import load_run
from apt.training.trainer import Trainer

PROFILE = """\
name: reversing
model:
  {{architecture: encoder_decoder, num_encoder_layers: 1, num_decoder_layers: 1, d_model: 48, num_heads: 4, d_ff: 64,
   max_seq_len: 8, dropout: 0.0, attention_dropout: 0.0, attention: {{provider: sdpa, positions: learned}}}}
training: {{max_steps: 300, batch_size: 64, learning_rate: 1e-2, warmup_steps: 20, weight_decay: 0.0}}
data: {{source: pairs, path: "{path}"}}
evaluation: {{eval_every: 300, sample_tokens: 0}}
monitoring: {{plot: false}}
"""
WORDS = ["".join(letters) for letters in itertools.product("abcdef", repeat=4)]


def profile(folder: Path, sets: list[str] | None = None, lines: list[str] | None = None) -> Profile:
    path = folder / "words.jsonl"
    told = [json.dumps({"source": word, "target": word[::-1]}) for word in WORDS]
    path.write_text("\n".join(told if lines is None else lines))
    (folder / "profile.yaml").write_text(PROFILE.format(path=path))
    return load_profile(folder / "profile.yaml", sets=sets or [])


def build(folder: Path, sets: list[str] | None = None) -> EncoderDecoder:
    read = profile(folder, sets)
    torch.manual_seed(0)
    model = ModelBuilder(read.config, resolved=read.resolved).build_model().eval()
    assert isinstance(model, EncoderDecoder)
    return model


def ids(*rows: str) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*(ord(each) + 3 for each in row), *[0] * (longest - len(row))] for row in rows])


@pytest.mark.thorough
def test_it_learns_to_reverse_words_that_it_has_not_seen(tmp_path: Path) -> None:
    read = profile(tmp_path)
    result = Trainer(read.config, tmp_path / "run", resolved=read.resolved).fit()
    assert result.validation.loss < 0.1
    run = load_run(tmp_path / "run")
    words = WORDS[::13]
    written = [each.text for each in generate_batch(run.model, run.tokenizer, words, temperature=0)]
    right = sum(text == word[::-1] for word, text in zip(words, written, strict=True))
    assert right / len(words) > 0.9
    assert generate(run.model, run.tokenizer, words[5], temperature=0).text == written[5]


def test_targets_are_causal_sources_are_not_and_padding_on_the_right_of_either_changes_nothing(tmp_path: Path) -> None:
    model = build(tmp_path)
    right = model(ids("abcd"), ids("efgh")).logits
    assert torch.equal(model(ids("abxy"), ids("efgh")).logits[:, :2], right[:, :2])
    assert not torch.allclose(model(ids("abcd"), ids("efgx")).logits[:, :1], right[:, :1], atol=1e-5)
    padded = model(ids("abcd", "abcdef"), ids("efgh", "efghij")).logits
    torch.testing.assert_close(padded[:1, :4], right)


@pytest.mark.parametrize("options", [{}, {"window": 3, "positions": "rope"}, {"sinks": "true", "num_kv_heads": 2}])
def test_decoding_from_a_cache_reads_what_one_pass_reads(tmp_path: Path, options: dict[str, object]) -> None:
    model = build(tmp_path, [f"model.attention.{name}={value}" for name, value in options.items()])
    with torch.no_grad():
        whole = model(ids("abcdefg"), ids("efgh")).logits
        memory, cache = model.encode(ids("efgh")), model.create_cache(1)
        parts = [model(each, memory, cache=cache).logits for each in ids("abcdefg").split([3, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_parameters_are_foretold_exactly_and_operations_within_a_tenth(tmp_path: Path) -> None:
    sets = ["model.num_encoder_layers=3", "model.num_decoder_layers=2", "model.vocab_size=259", "model.ffn=swiglu"]
    read, model = profile(tmp_path, sets), build(tmp_path, sets)
    assert read.resolved is not None
    cost = estimate(read.config, read.resolved)
    assert cost.parameters == sum(each.numel() for each in model.parameters())
    tokens = torch.randint(3, 259, (1, 8))
    assert cost.flops_per_token == pytest.approx(count_flops(lambda: model(tokens, tokens)) / 8, rel=0.1)
    cache = model.create_cache(1, 4)
    assert cost.cache_per_token == sum(each.k.numel() + each.v.numel() for each in cache)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.num_layers=2"], r"model\.num_layers: is for decoders.*num_encoder_layers and num_decoder_layers"),
        (["model.num_encoder_layers=0"], r"model\.num_encoder_layers: 0 is not allowed; 1 or more"),
        (["model.architecture=decoder"], r"data\.source: 'pairs' gives pairs, and a decoder reads one text"),
        (
            ["data.source=files", "data.path=x.txt"],
            "gives no pairs of source and target; an encoder-decoder needs them",
        ),
    ],
)
def test_what_does_not_go_together_is_a_fault_of_the_profile(tmp_path: Path, sets: list[str], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile(tmp_path, sets)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a"}', r"words\.jsonl: line 1: has no field 'target'"),
        ('{"source": "", "target": "a"}', "line 1: its field 'source' is empty; leave the line out"),
        (
            '{"source": "abcdefghi", "target": "a"}',
            r"of the .* pairs of the train split are longer than max_seq_len = 8",
        ),
    ],
)
def test_pairs_that_cannot_be_read_are_named(tmp_path: Path, line: str, message: str) -> None:
    lines = [line] * 30 if len(line) > 35 else [line]
    read = profile(tmp_path, lines=lines)
    with pytest.raises(DataError, match=message):
        Trainer(read.config, tmp_path / "run", resolved=read.resolved).fit()


def test_an_id_that_starts_a_text_and_stands_within_one_is_refused(tmp_path: Path) -> None:
    read = profile(tmp_path, ["model.bos_token_id=100"])
    with pytest.raises(DataError, match=r"model\.bos_token_id: the tokenizer gives the id 100 within texts too"):
        Trainer(read.config, tmp_path / "run", resolved=read.resolved).fit()
