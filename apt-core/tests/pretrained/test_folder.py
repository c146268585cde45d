"""Safetensors folders: what we write we read as the same model, and what is no Llama is refused with every reason."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from apt.cli import main
from apt.errors import UserError
from apt.inference.generate import generate
from apt.pretrained.exporting import export_hf
from apt.pretrained.importing import import_model
from apt.pretrained.llama import LlamaShape

from .conftest import change, loaded, logits, train

tokenizers = pytest.importorskip("tokenizers")


def copy(folder: Path, to: Path, **config: object) -> Path:
    """The folder, with other values in its config.json."""
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


def test_a_model_that_was_exported_and_imported_gives_equal_logits(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    before, after = loaded(trained), loaded(import_model("hf", exported, tmp_path / "run"))
    assert torch.equal(logits(before), logits(after))
    assert after.tokenizer.encode("The banging") == before.tokenizer.encode("The banging")
    assert after.special == before.special


def test_what_starts_and_ends_a_text_here_does_there(exported: Path, corpus: Path, tmp_path: Path) -> None:
    export_hf(loaded(train(tmp_path / "x", corpus, tokenizer="byte")), tmp_path / "bytes")
    for folder in (exported, tmp_path / "bytes"):
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        plain = theirs.encode("The ban", add_special_tokens=False).ids
        assert theirs.encode("The ban").ids == [1, *plain]
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 1]
    again = tmp_path / "again"
    export_hf(loaded(import_model("hf", exported, tmp_path / "run")), again)
    assert tokenizers.Tokenizer.from_file(str(again / "tokenizer.json")).encode("").ids == [1]


def test_the_head_of_a_tied_model_is_not_written_and_is_tied_again(corpus: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "tied", corpus, tied=True)
    export_hf(loaded(run), tmp_path / "hf")
    change(tmp_path / "hf", **{"lm_head.weight": loaded(run).model.head.weight})  # as some checkpoints do
    again = loaded(import_model("hf", tmp_path / "hf", tmp_path / "again"))
    assert again.model.head.weight is again.model.embedding.weight
    assert torch.equal(logits(again), logits(loaded(run)))
    apart = loaded(import_model("hf", tmp_path / "hf", tmp_path / "apart", sets=["model.tie_embeddings=false"]))
    assert apart.model.head.weight is not apart.model.embedding.weight
    assert torch.equal(logits(apart), logits(again))


def test_a_model_with_a_head_of_its_own_is_not_tied_in_silence(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a head of its own, which model\.tie_embeddings: true has no place for"):
        import_model("hf", exported, tmp_path / "run", sets=["model.tie_embeddings=true"])


@pytest.mark.parametrize("bias", ["qkv", "all"])
def test_widths_biases_and_scaled_positions_survive_too(corpus: Path, tmp_path: Path, bias: str) -> None:
    scaling = "{type: llama3, factor: 4.0, original_max_seq_len: 8, high_freq_factor: 3.0}"
    options = f", head_width: 6, bias: {bias}, rope_scaling: {scaling}"
    before = loaded(train(tmp_path / "x", corpus, tokenizer="byte", attention=options))
    with torch.no_grad():
        for name, parameter in before.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    export_hf(before, tmp_path / "hf")
    after = loaded(import_model("hf", tmp_path / "hf", tmp_path / "again"))
    assert torch.equal(logits(after), logits(before))
    said = after.config.get_provider_config("attention")["rope_scaling"]
    assert said == {
        "type": "llama3",
        "factor": 4.0,
        "original_max_seq_len": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
    }


def test_bytes_are_exported_as_a_tokenizer_that_joins_nothing(corpus: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "bytes", corpus, tied=True, tokenizer="byte")
    export_hf(loaded(run), tmp_path / "hf")
    again = loaded(import_model("hf", tmp_path / "hf", tmp_path / "again"))
    text = "".join(map(chr, range(300))) + "日本 <bos> \U0001f600\r\n  x"
    assert list(again.tokenizer.encode(text)) == list(loaded(run).tokenizer.encode(text))
    assert again.tokenizer.decode(again.tokenizer.encode(text)) == text


def test_an_imported_run_writes_is_scored_and_is_trained_on(
    exported: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    sets = ["--set=data.source=files", f"--set=data.path={corpus}", "--set=training.batch_size=2"]
    more = ["--set=training.max_steps=2", "--set=evaluation.sample_tokens=0", "--set=monitoring.plot=false"]
    assert main(["import", "hf", str(exported), "--out", str(out), *sets, *more]) == 0
    assert main(["generate", str(out), "--prompt", "The ", "--max-new-tokens", "4"]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert "trained elsewhere" in capsys.readouterr().err
    before = loaded(out)
    assert main(["train", "-p", str(out / "profile.yaml"), "--resume", "auto", "--out", str(out)]) == 0
    after = loaded(out)
    assert after.state.step == 2
    assert not torch.equal(logits(before), logits(after))


def test_shards_are_read_through_their_index(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(exported, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
    where = {name: f"{index % 2}.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    assert torch.equal(
        logits(loaded(import_model("hf", folder, tmp_path / "a"))),
        logits(loaded(import_model("hf", exported, tmp_path / "b"))),
    )


def test_shards_that_are_not_as_their_index_says_are_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(exported, tmp_path / "hf")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        where = dict.fromkeys(file.keys(), "model.safetensors")
    first = "model.embed_tokens.weight"
    for changed, message in (
        ({**where, first: "gone.safetensors"}, "gone.safetensors: is not there, and model.safetensors.index.json says"),
        ({**where, first: "config.json"}, "config.json: is not a safetensors file"),
        ({**where, "model.layers.0.self_attn.q_proj.bias": "model.safetensors"}, "q_proj.bias"),
        ([], "has no weight_map"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        assert main(["import", "hf", str(folder), "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_ids_that_end_a_text_are_those_of_the_generation_config_too(exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    run = loaded(import_model("hf", folder, tmp_path / "run"))
    assert run.special.stop == frozenset((1, 2, 9))
    every = generate(run.model, run.tokenizer, "The", special=run.special, max_new_tokens=300, temperature=5.0)
    assert 9 not in every.tokens
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert loaded(import_model("hf", folder, tmp_path / "one")).special.stop == frozenset((1, 2, 9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not what this family has; models of the types llama"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "linear, llama3 and yarn are"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "without ['mscale']"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"eos_token_id": ["x"]}, "eos_token_id: 'x' is no id"),
        ({"bos_token_id": {}}, "bos_token_id: {} is no id"),
        ({"rope_theta": [1]}, "rope_theta: [1] is no number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' is not what this family has; a number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: is missing, or is no whole number"),
        (
            {"model_type": "mistral", "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window: 7 in 1 of 2 layers; here all layers have a window or none has",
        ),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window: 7 in 1 of 2 layers",
        ),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": "all"},
            "max_window_layers: 'all' is no whole number",
        ),
    ],
)
def test_what_is_no_llama_is_refused(exported: Path, tmp_path: Path, config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        import_model("hf", copy(exported, tmp_path / "hf", **config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral"}, 7),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 64}, None),
        ({"model_type": "qwen2"}, None),
        ({"model_type": "qwen2", "use_sliding_window": True}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 7),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 7),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_a_window_is_read_as_transformers_reads_it(config: dict[str, object], window: int | None) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": 259, "max_position_embeddings": 64, "eos_token_id": 2, "sliding_window": 7}
    assert LlamaShape.from_hf({**sizes, **more, **config}, "config.json").window == window


def test_a_tensor_that_has_no_place_or_is_missing_is_named(exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path / "hf")
    change(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)})
    with pytest.raises(UserError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        import_model("hf", folder, tmp_path / "a")
    folder = copy(exported, tmp_path / "more", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"has no tensor model\.layers\.2\.self_attn\.q_proj\.weight"):
        import_model("hf", folder, tmp_path / "b")


def test_missing_files_are_named(exported: Path, tmp_path: Path) -> None:
    for name, message in (
        ("config.json", "holds no config.json"),
        ("tokenizer.json", "holds no tokenizer.json"),
        ("model.safetensors", "weights in pickles"),
    ):
        folder = copy(exported, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(UserError, match=message):
            import_model("hf", folder, tmp_path / "run")
    with pytest.raises(UserError, match="there is no such file"):
        import_model("hf", tmp_path / "nowhere", tmp_path / "run")


def test_a_model_that_transformers_has_not_is_explained(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-p", str(profile_file), "--out", str(tmp_path / "run")]) == 0
    assert main(["export", "hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert "model.norm: LlamaForCausalLM has rmsnorm, this model layernorm" in said
    assert "model.ffn: LlamaForCausalLM has swiglu, this model default" in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("asked", ["flash_v2", "flex"])
def test_attention_with_the_weights_of_sdpa_is_exported_as_it_is(trained: Path, tmp_path: Path, asked: str) -> None:
    run = loaded(trained)
    options = {**run.config.options["attention"], **({"compiled": False} if asked == "flex" else {})}
    changed = {"attention_name": asked, "options": {**run.config.options, "attention": options}}
    run = replace(run, config=run.config.model_copy(update=changed))
    export_hf(run, tmp_path / "fallback")  # the profile asks for it, and sdpa stood in
    assert (tmp_path / "fallback" / "model.safetensors").is_file()
    assert LlamaShape.from_config(run.config).num_kv_heads == 2


def test_tensors_of_other_sizes_and_another_tokenizer_are_told_as_faults_of_the_folder(
    exported: Path, tmp_path: Path
) -> None:
    folder = copy(exported, tmp_path / "narrow", intermediate_size=30)
    with pytest.raises(UserError, match=r"ffn\.up\.weight is \[48, 16\] in its tensors, and \[60, 16\] by its config"):
        import_model("hf", folder, tmp_path / "a")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: is not UTF-8"):
        import_model("hf", folder, tmp_path / "a")
    for given, kind in (("[]", "list"), ('"x"', "str")):
        (folder / "tokenizer_config.json").write_text(given)
        with pytest.raises(UserError, match=f"tokenizer_config.json: holds a {kind}, not an object"):
            import_model("hf", folder, tmp_path / "a")
    folder = copy(exported, tmp_path / "ends")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, {}]}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: \{\} is no id"):
        import_model("hf", folder, tmp_path / "a")
    folder = copy(exported, tmp_path / "odd")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is no file of the tokenizers library"):
        import_model("hf", folder, tmp_path / "b")


def test_of_several_chat_templates_the_default_is_taken(exported: Path, tmp_path: Path) -> None:
    folder = copy(exported, tmp_path / "hf")
    path = folder / "tokenizer_config.json"
    several = [3, {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": several}))
    run = loaded(import_model("hf", folder, tmp_path / "run"))
    assert run.tokenizer.chat_template == "usual"  # type: ignore[attr-defined]
