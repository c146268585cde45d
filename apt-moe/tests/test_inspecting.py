"""What a text shows of the experts."""

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.core.providers import Tokenizer
from apt.core.registry import registry
from apt.errors import UserError
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder
from apt.modeling.parts import set_active
from apt_moe import inspecting
from apt_moe.cli import main

TEXT = "the cat sat on the mat and the dog sat on the log " * 3


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    options = {"experts": 4, "router": {"provider": "hash", "top_k": 1}}
    config = APTConfig(
        vocab_size=300,
        d_model=16,
        d_ff=24,
        num_heads=2,
        num_layers=2,
        max_seq_len=32,
        attention_name="sdpa",
        ffn_name="moe",
        align_name="none",
        options={"ffn": options},
    )
    return ModelBuilder(config).build_model()


def test_every_token_is_traced_in_every_block_and_typical_tokens_are_those_that_go_there(model: Decoder) -> None:
    tokens = [byte + 3 for byte in TEXT.encode()]
    routings = inspecting.trace(model, tokens, 32)
    assert [routing.path for routing in routings] == ["blocks.0.ffn", "blocks.1.ffn"]
    for routing in routings:
        assert routing.indices.shape == (len(tokens), 1)
        assert sum(routing.load) == pytest.approx(1)
        owner = dict(zip(tokens, routing.first, strict=True))
        assert all(owner[token] == expert for token, expert in zip(tokens, routing.first, strict=True))
        met = Counter(tokens)
        for expert in range(4):
            typical = routing.typical(tokens, expert, 5)
            assert all(owner[token] == expert and share == 1 and count == met[token] for token, share, count in typical)
            assert [count for *_, count in typical] == sorted((count for *_, count in typical), reverse=True)
    assert model.training


def test_a_model_without_experts_that_are_on_is_refused(model: Decoder) -> None:
    set_active(model, "moe", False)
    with pytest.raises(UserError, match="has no experts that are switched on"):
        inspecting.trace(model, [5, 6], 32)


PAIRS = """
name: pairs
model:
  {{architecture: encoder_decoder, num_encoder_layers: 1, num_decoder_layers: 1, d_model: 16, num_heads: 2, d_ff: 24,
   max_seq_len: 32, attention: {{provider: sdpa}},
   ffn: {{provider: moe, experts: 4, layers: {layers}, router: {{provider: hash, top_k: 1}}}}}}
training: {{max_steps: 1, warmup_steps: 0}}
data: {{source: pairs, path: pairs.jsonl}}
"""


def test_of_an_encoder_decoder_the_encoder_s_experts_are_traced(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')

    def build(layers: str) -> torch.nn.Module:
        file = tmp_path / "profile.yaml"
        file.write_text(PAIRS.format(layers=layers))
        profile = load_profile(file)
        return ModelBuilder(profile.config, resolved=profile.resolved).build_model()

    tokens = [byte + 3 for byte in TEXT.encode()]
    (routing,) = inspecting.trace(build("all"), tokens, 32)
    assert routing.path == "encoder.0.ffn"
    assert routing.indices.shape == (len(tokens), 1)
    with pytest.raises(UserError, match="this encoder has no experts that are switched on; those of the decoder"):
        inspecting.trace(build("[1]"), tokens, 32)


@pytest.fixture
def tokenizer(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """That of the run which is inspected, whatever its folder."""
    tokenizer = registry.get("tokenizer", "byte", fallback=False).train([])
    run = SimpleNamespace(model=model, tokenizer=tokenizer, config=SimpleNamespace(max_seq_len=32))
    monkeypatch.setattr("apt.runs.load_run", lambda folder, allow_local_code: run)
    return tokenizer


@pytest.mark.usefixtures("tokenizer")
def test_the_view_shows_the_text_and_each_expert_s_load(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    shown = io.StringIO()
    asked = {"layer": None, "top": 3, "chars": 40, "allow_local_code": False}
    inspecting.inspect_run(tmp_path, file, **asked, console=Console(file=shown, width=150))
    assert TEXT[:40] in shown.getvalue()
    assert TEXT[:45] not in shown.getvalue()
    assert "block 1" in shown.getvalue()
    assert shown.getvalue().count("%") >= 4
    with pytest.raises(UserError, match="--layer 7: has no experts; blocks that have: 0, 1"):
        inspecting.inspect_run(tmp_path, file, **asked | {"layer": 7})
    for option in ("top", "chars"):
        with pytest.raises(UserError, match=f"--{option} -1: is not allowed; 0 or more"):
            inspecting.inspect_run(tmp_path, file, **asked | {option: -1})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        main(["inspect", str(tmp_path), "--text", str(file)])
    file.write_text("")
    with pytest.raises(UserError, match="is empty"):
        inspecting.inspect_run(tmp_path, file, **asked)


def test_characters_of_several_bytes_are_shown_whole_and_line_ends_are_those_of_the_file(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    trace = inspecting.trace
    monkeypatch.setattr(
        inspecting, "trace", lambda model, tokens, seq: (read.append(tokens), trace(model, tokens, seq))[1]
    )
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE}, \u4e2d\u6587 \U0001f600, \ufffd.\r\nend"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    shown = io.StringIO()
    asked = {"layer": None, "top": 0, "chars": 99, "allow_local_code": False}
    inspecting.inspect_run(tmp_path, file, **asked, console=Console(file=shown, width=150))
    assert read == [tokenizer.encode(text)]
    assert all(line in shown.getvalue() for line in text.split("\r\n"))


@pytest.mark.usefixtures("tokenizer")
def test_control_characters_of_the_text_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("a\x1b[2Jb\x07\x9b\0\tc\nd\r".encode())
    shown = io.StringIO()
    asked = {"layer": None, "top": 9, "chars": 99, "allow_local_code": False}
    inspecting.inspect_run(tmp_path, file, **asked, console=Console(file=shown, width=150))
    assert r"a\x1b[2Jb\x07\x9b\x00" in shown.getvalue()
    assert "c\nd\\r\n" in shown.getvalue()
    assert not set(shown.getvalue()) & {"\x1b", "\x07", "\x9b", "\0", "\r"}


def test_a_token_that_no_expert_chose_is_no_expert_s() -> None:
    indices = torch.arange(3).expand(2, 3)
    routing = inspecting.Routing("ffn", 3, indices, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.1, 0.4]]))
    assert routing.first == [None, 2]
    assert routing.load == [0.0, 0.5, 0.5]
