"""Profiles: inheritance, the command line, and every kind of mistake with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apt.core.discovery import discover
from apt.core.profile import Profile, dump_profile, load_profile, to_choice
from apt.core.registry import Registry
from apt.errors import ProfileError

BASE = """\
name: base
model:
  d_model: 32
  num_heads: 4
  attention: {provider: sdpa, num_kv_heads: 2}
  ffn: swiglu
training: {max_epochs: 2, learning_rate: 3e-5}
data: {source: stdlib}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def load(path: Path, **options: object) -> Profile:
    return load_profile(path, registry=Registry(discover), **options)  # type: ignore[arg-type]


def faults(path: Path, **options: object) -> str:
    with pytest.raises(ProfileError) as caught:
        load(path, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


def faults_of(folder: Path, text: str, **options: object) -> str:
    (folder / "x.yaml").write_text(text)
    return faults(folder / "x.yaml", **options)


def test_values_come_from_the_file_and_know_their_place(folder: Path) -> None:
    profile = load(folder / "base.yaml")
    assert profile.config.d_model == 32
    assert profile.config.base_lr == 3e-5
    assert profile.config.attention_name == "sdpa"
    assert profile.config.get_provider_config("attention") == {"num_kv_heads": 2}
    assert profile.origin("model.attention.num_kv_heads").endswith("base.yaml:5:45")
    assert profile.origin("model.dropout") == "default"
    assert profile.resolved is not None
    assert profile.resolved.providers["attention"].num_kv_heads == 2  # type: ignore[attr-defined]


def test_where_the_vocabulary_is_not_stated_it_is_the_tokenizers(folder: Path) -> None:
    assert load(folder / "base.yaml").config.vocab_size == 259
    assert load(folder / "base.yaml", sets=["model.vocab_size=300"]).config.vocab_size == 300
    assert "258 is too small: the tokenizer byte has 259 ids" in faults(
        folder / "base.yaml", sets=["model.vocab_size=258"]
    )


def test_a_profile_inherits_through_a_chain(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "middle.yaml").write_text("base: ../base.yaml\nmodel: {d_model: 64, ffn: {provider: swiglu}}\n")
    (folder / "top.yaml").write_text("base: sub/middle.yaml\nname: top\nmodel: {attention: {num_kv_heads: 4}}\n")
    profile = load(folder / "top.yaml")
    config = profile.config
    assert (config.name, config.d_model, config.ffn_name) == ("top", 64, "swiglu")
    assert config.get_provider_config("attention") == {"num_kv_heads": 4}
    assert profile.origin("model.d_model").endswith("middle.yaml:2:18")
    assert profile.origin("training.learning_rate").endswith("base.yaml:7:42")


def test_another_provider_leaves_the_options_of_the_first_behind(folder: Path) -> None:
    (folder / "top.yaml").write_text("base: base.yaml\nmodel: {ffn: {provider: default}}\n")
    assert load(folder / "top.yaml").config.ffn_name == "default"
    config = load(folder / "base.yaml", sets=["model.ffn={provider: default, bias: true}", "model.ffn.provider=swiglu"])
    assert config.config.get_provider_config("ffn") == {}


def test_a_circle_of_bases_is_refused(folder: Path) -> None:
    (folder / "a.yaml").write_text("base: b.yaml\n")
    (folder / "b.yaml").write_text("base: a.yaml\n")
    assert "inherits from itself: a.yaml -> b.yaml -> a.yaml" in faults(folder / "a.yaml")


def test_a_base_that_is_missing_or_no_path_is_refused(folder: Path) -> None:
    assert "nope.yaml: cannot be read: No such file" in faults_of(folder, "base: nope.yaml\n")
    (folder / "round.yaml").symlink_to("round.yaml")
    assert "round.yaml: cannot be read: Too many levels of symbolic links" in faults_of(folder, "base: round.yaml\n")
    assert "x.yaml:1:7: base: 3 is not the path of a profile" in faults_of(folder, "base: 3\n")


def test_set_changes_any_value_and_is_its_origin(folder: Path) -> None:
    sets = ["model.d_model=64", "model.ffn.provider=default", "model.ffn.bias=true", "training.betas=[0.8, 0.9]"]
    profile = load(folder / "base.yaml", sets=sets)
    assert profile.config.d_model == 64
    assert profile.config.get_provider_config("ffn") == {"bias": True}
    assert profile.config.training.betas == (0.8, 0.9)
    assert profile.origin("model.d_model") == "--set model.d_model=64"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("name=2026", "name", "2026"),
        ("version=1.0", "version", "1.0"),
        ("name='quoted'", "name", "quoted"),
        ("description=", "description", ""),
        ("description=a: b # c", "description", "a: b # c"),
        ("description=[1, 2", "description", "[1, 2"),
        ("evaluation.sample_prompt=def f(): #", "evaluation.sample_prompt", "def f(): #"),
        ("training.learning_rate=3", "base_lr", 3.0),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.save_every=10", "training.save_every", 10),
        ("training.save_every=10 min", "training.save_every", "10 min"),
        ("training.betas=0.8,0.9", "training.betas", (0.8, 0.9)),
        ("plugins=[]", "plugins", ()),
        ("extra.a.b=3", "extra", {"a": {"b": 3}}),
        ("model.attention_name=sdpa", "attention_name", "sdpa"),
        ("model.attention={provider: sdpa}", "options.attention", {"num_kv_heads": 2}),
        ("model.attention.provider=sdpa", "options.attention", {"num_kv_heads": 2}),
        ("model.attention.num_kv_heads=4", "options.attention", {"num_kv_heads": 4}),
        ("model.ffn.provider=swiglu", "ffn_name", "swiglu"),
        ("model.ffn=null", "ffn_name", "default"),
        ("data.path=1", "data.path", "1"),
        ("data.path=[a, b]", "data.path", ["a", "b"]),
        ("data.path={a: b}", "data.path", "{a: b}"),
    ],
)
def test_a_set_value_has_the_type_of_its_option(folder: Path, text: str, path: str, value: object) -> None:
    first = ["data.source=files", "data.path=x"] if text.startswith("data") else []
    found: object = load(folder / "base.yaml", sets=[*first, text]).config
    for key in path.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_every_set_that_is_wrong_is_told(folder: Path) -> None:
    sets = [
        "model.d_model={",
        "base=other.yaml",
        "training.betas=0.8,0.9",
        "training.betas.0=1",
        "training.max_epochs=no",
        "x",
    ]
    told = faults(folder / "base.yaml", sets=sets).splitlines()
    assert told[0].startswith("--set model.d_model={: did not find")
    assert told[1:] == [
        "--set base=other.yaml: a base is inherited before --set is applied; name it in a file",
        "--set training.betas.0=1: betas is a list; give the whole of it",
        "--set x: is not of the form a.b=value",
        "--set training.max_epochs=no: training.max_epochs: 'no' is not allowed; input should be a whole number or null",
    ]


def test_a_name_and_a_mapping_of_a_provider_are_merged_as_one(folder: Path) -> None:
    (folder / "name.yaml").write_text(BASE.replace("attention: {provider: sdpa, num_kv_heads: 2}", "attention: sdpa"))
    (folder / "x.yaml").write_text("base: name.yaml\nmodel: {attention: {num_kv_heads: 2}}\n")
    config = load(folder / "x.yaml").config
    assert (config.attention_name, config.options["attention"]) == ("sdpa", {"num_kv_heads": 2})
    (folder / "x.yaml").write_text("base: base.yaml\nmodel: {attention: sdpa}\n")
    assert load(folder / "x.yaml").config.options["attention"] == {"num_kv_heads": 2}


def test_a_source_of_text_that_is_replaced_leaves_its_options_behind_and_the_tokenizer_stays(folder: Path) -> None:
    (folder / "y.yaml").write_text(
        BASE.replace("source: stdlib", "source: files, path: x, tokenizer: {provider: byte}")
    )
    profile = load(folder / "y.yaml", sets=["data.source=stdlib"])
    assert profile.config.data.model_extra == {}
    assert profile.origin("data.path") == "default"
    assert profile.origin("data.tokenizer.provider").endswith("y.yaml:8:54")


def test_an_option_of_the_provider_before_is_no_origin(folder: Path) -> None:
    (folder / "x.yaml").write_text("base: base.yaml\nmodel: {ffn: {provider: default, bias: true}}\n")
    assert load(folder / "x.yaml", sets=["model.ffn=swiglu"]).origin("model.ffn.bias") == "default"


def test_null_takes_away_what_was_inherited(folder: Path) -> None:
    schedules = "schedules: {enable_x_at_epoch: 1}\n"
    (folder / "x.yaml").write_text(BASE.replace("  ffn: swiglu", "  ffn: swiglu\n  align: {alpha: 0.1}") + schedules)
    (folder / "y.yaml").write_text("base: x.yaml\nmodel: {align: null}\nschedules: {enable_x_at_epoch: null}\n")
    config = load(folder / "y.yaml").config
    assert (config.schedules, "align" in config.options) == ({}, False)


def test_an_old_section_can_be_changed_and_switched_off_from_above(folder: Path) -> None:
    moe = "  moe: {enabled: true, experts: 4}\n"
    (folder / "x.yaml").write_text(BASE.replace("  ffn: swiglu\n", moe))
    config = load(folder / "x.yaml", sets=["model.moe.enabled=false"]).config
    assert (config.ffn_name, config.options["ffn"]) == ("default", {})
    assert "does not list the plugin 'moe'" in faults(folder / "x.yaml")


def test_a_chain_of_bases_has_an_end(folder: Path) -> None:
    for number in range(30):
        (folder / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    assert "16.yaml: is inherited through more than 16 files" in faults(folder / "0.yaml")
    assert "base: 'a\\x00b' is not the path of a profile" in faults_of(folder, 'base: "a\\0b"\n')


def test_a_chain_of_bases_has_no_more_values_than_one_file_may_have(folder: Path) -> None:
    for number in range(3):
        base = f"base: {number + 1}.yaml\n" if number < 2 else ""
        (folder / f"{number}.yaml").write_text(base + "".join(f"k{number}_{n}: 1\n" for n in range(1500)))
    told = faults(folder / "0.yaml")
    assert told == "0.yaml: has, with what it inherits, more than 4000 values; a profile has fewer"


def test_the_plugins_of_the_command_line_replace_the_list(folder: Path) -> None:
    text = BASE + "plugins: [nobody]\n"
    assert "x.yaml:9:10: plugins: no plugin provider 'nobody' is installed" in faults_of(folder, text)
    assert load(folder / "x.yaml", plugins=[]).config.plugins == ()


@pytest.mark.parametrize("text", ["model.d_model", "=3", "", "...=1"])
def test_a_set_that_is_no_assignment_is_refused(folder: Path, text: str) -> None:
    assert "is not of the form a.b=value" in faults(folder / "base.yaml", sets=[text])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainig.max_epochs=3", "trainig: no such section; did you mean 'training'?"),
        ("model.d_modl=3", "model.d_modl: no such option; did you mean 'd_model'?"),
        ("training.learning_rat=1", "training.learning_rat: no such option; did you mean 'learning_rate'?"),
        ("model.attention.num_kv_hads=2", "model.attention.num_kv_hads: no such option; did you mean 'num_kv_heads'?"),
        ("model.d_model=0", "model.d_model: 0 is not allowed; input should be greater than or equal to 1"),
        ("model.d_model=4.5", "model.d_model: 4.5 is not allowed"),
        ("model.d_model=true", "model.d_model: True is not allowed; input should be a whole number"),
        ("model.d_model='32'", "model.d_model: '32' is not allowed; input should be a whole number"),
        ("model.d_model=null", "model.d_model: None is not allowed"),
        ("model.dropout=1.0", "model.dropout: 1.0 is not allowed; input should be less than 1"),
        ("model.dropout=1e999", "1e999 is too large a number"),
        ("model.tie_embeddings=1", "model.tie_embeddings: 1 is not allowed; input should be true or false"),
        (
            "model.activation=gleu",
            "'gleu' is not allowed; did you mean 'gelu'? input should be 'gelu', 'relu' or 'silu'",
        ),
        ("training.batch_size=[2]", "training.batch_size: [2] is not allowed"),
        (
            "training.accumulate=1000000000000",
            "training.accumulate: 1000000000000 is not allowed; input should be less than or equal to 1000000",
        ),
        ("training.compile=1", "training.compile: 1 is not allowed; input should be true or false"),
        ("training.precision=fp16", "'fp16' is not allowed; did you mean 'bf16'? input should be 'fp32' or 'bf16'"),
        ("model.attention.num_kv_heads=0", "model.attention.num_kv_heads: 0 is not allowed"),
        ("model.attention.num_kv_heads=true", "model.attention.num_kv_heads: True is not allowed"),
        (
            "model.attention.provider=spda",
            "model.attention.provider: no attention provider 'spda' is installed; did you",
        ),
        ("model.attention={provider: flash_v9}", "model.attention.provider: no attention provider 'flash_v9'"),
        ("model.attention=[1]", "model.attention: [1] is not a provider; give a name, or {provider: name"),
        ("model.num_heads=3", "model.d_model: 32 is not a multiple of num_heads 3; such as 30"),
        ("model.attention.num_kv_heads=3", "model.attention.num_kv_heads: 3 does not divide the model's 4 heads"),
        ("model=[1]", "model: [1] is not a mapping; keys: architecture"),
        ("training=3", "training: 3 is not a mapping"),
        ("plugins=[{moe: 3}]", "plugins.0.moe: 3 is not a mapping of options"),
        ("plugins=[3]", "plugins.0: 3 is not a plugin; give a name, or {name: {option: value}}"),
        ("schedules=[1]", "schedules: [1] is not allowed"),
        (
            "schedules.enable_moe_at_epoch=1",
            "schedules.enable_moe_at_epoch: the profile does not list the plugin 'moe'",
        ),
        ("schedules.route_temp={start: 1, end: 2}", "schedules.route_temp: this model has no such value; it has none"),
        ("data={source: fils}", "data.source: no data provider 'fils' is installed; did you mean 'files'?"),
        ("data={source: files}", "data.path: must be given"),
        ("data.pth=x", "data.pth: no such option; options: none"),
        (
            "data.tokenizer=bite",
            "data.tokenizer.provider: no tokenizer provider 'bite' is installed; did you mean 'byte'?",
        ),
        ("data.tokenizer={provider: byte, x: 1}", "data.tokenizer.x: no such option"),
        ("training.max_epochs=null", "training: gives neither max_epochs nor max_steps; say how long to train"),
        ("model.align=bistate_default", "model.align: is configured, but nothing switches it on; add it to plugins"),
        ("name=../x", "name: must be a name for a folder: 1 to 100 characters, none of them a slash"),
        ("name=", "name: must be a name for a folder"),
        ("extra=3", "extra: 3 is not allowed"),
    ],
)
def test_a_mistake_is_told_with_its_place_its_path_and_what_would_be_right(
    folder: Path, change: str, message: str
) -> None:
    seen = faults(folder / "base.yaml", sets=[change])
    assert message in seen
    assert f"--set {change}: " in seen or "base.yaml:" in seen


def test_all_faults_are_told_at_once_in_the_order_of_their_kind(folder: Path) -> None:
    text = """\
name: bad
trainig: {}
model:
  d_model: true
  dropout: 2
  attention: {provider: sdpa, num_kv_hads: 2}
  ffn: swigl
training: {max_epochs: 0, batch_size: x}
schedules: {enable_moe_at_epoch: 1}
data: {source: files}
"""
    places = re.findall(r"x\.yaml:(\d+):\d+: ([\w.]+)", faults_of(folder, text))
    assert set(places) == {
        ("2", "trainig"),
        ("4", "model.d_model"),
        ("5", "model.dropout"),
        ("6", "model.attention.num_kv_hads"),
        ("7", "model.ffn.provider"),
        ("8", "training.max_epochs"),
        ("8", "training.batch_size"),
        ("9", "schedules.enable_moe_at_epoch"),
        ("10", "data.path"),
    }


def test_null_takes_a_whole_section_away_and_nothing_at_all_is_a_mistake(folder: Path) -> None:
    (folder / "x.yaml").write_text("base: base.yaml\ndata: null\nextra: {a: 1}\n")
    assert load(folder / "x.yaml", sets=["extra=null"]).config.extra == {}
    assert "training: gives neither max_epochs nor max_steps" in faults(folder / "x.yaml", sets=["training=null"])
    told = faults_of(folder, "base: base.yaml\ntraining:\n  # max_epochs: 3\n")
    assert told.startswith("x.yaml:")
    assert "nothing follows 'training'; leave it out, or write null to take away what is inherited" in told


@pytest.mark.parametrize("attention", ['""', '{provider: ""}', '"${APT_TEST_NOTHING:-}"'])
def test_no_name_is_no_provider(folder: Path, attention: str) -> None:
    text = f"base: base.yaml\nmodel:\n  attention: {attention}\n"
    assert "model.attention: '' is no name of a provider" in faults_of(folder, text)


@pytest.mark.parametrize(
    "text",
    [
        "model: {{attention: {huge}}}",
        "model: {{attention: {{provider: {huge}, fallback: [{huge}]}}}}",
        "model: {{attention: {{provider: sdpa, {huge}: 1}}}}",
        "model: {{ffn: [{huge}]}}",
        "{huge}: 1",
        "plugins: [{huge}]",
        "training: {{precision: {huge}}}",
        "schedules: {{{huge}: {{start: 1, end: 2}}}}",
        "schedules: {{enable_{huge}_at_epoch: 1}}",
        "base: {huge}",
        "data: {{source: {huge}}}",
        "training: '{huge}'",
        "data: {{{huge}: 1, {huge}: 2}}",
        "plugins: '{words}'",
    ],
)
def test_what_is_given_may_be_long_and_what_is_said_of_it_is_not(folder: Path, text: str) -> None:
    said = text.format(huge="a" * 900_000, words="ab " * 300_000)
    told = faults_of(folder, said if "base" in said[:5] else f"base: base.yaml\n{said}\n")
    assert len(told) < 8_000


def test_a_base_in_another_folder_names_code_as_seen_from_there(tmp_path: Path, data_source: str) -> None:
    for place in ("top/parts", "aside"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "mine.py").write_text(data_source)
        text = BASE.replace("{source: stdlib}", "{source: './mine.py:Mine', size: 7}")
        (tmp_path / place / "base.yaml").write_text(text)
    top = tmp_path / "top" / "x.yaml"
    top.write_text("base: parts/base.yaml\nname: x\n")
    profile = load(top)
    assert profile.config.data.source == "./parts/mine.py:Mine"
    assert profile.resolved is not None
    assert profile.resolved.providers["data"].size == 7  # type: ignore[attr-defined]

    (tmp_path / "top" / "mine.py").write_text("raise RuntimeError('not this one')")
    top.write_text("base: ../aside/base.yaml\nname: x\n")
    assert "aside/mine.py lies outside of" in faults(top)
    profile = load(top, allow_local_code=True)
    assert profile.config.data.source == "../aside/mine.py:Mine"
    assert profile.origin("data.source").endswith("aside/base.yaml:8:16")


def test_a_plugin_in_a_file_keeps_its_place_with_its_options(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    code = "from apt.core.providers import Plugin\n\n\nclass Mine(Plugin):\n    'A plugin.'\n\n    r: int = 1\n"
    (tmp_path / "aside" / "mine.py").write_text(code)
    (tmp_path / "aside" / "base.yaml").write_text(BASE + "plugins: [{./mine.py:Mine: {r: x}}]\n")
    (tmp_path / "x.yaml").write_text("base: aside/base.yaml\nname: x\n")
    told = faults(tmp_path / "x.yaml")
    assert "aside/base.yaml:9:10: plugins../aside/mine.py:Mine.r: 'x' is not allowed" in told
    (tmp_path / "aside" / "base.yaml").write_text(BASE + "plugins: [{./mine.py:Mine: {r: 2}}]\n")
    profile = load(tmp_path / "x.yaml")
    assert profile.config.plugins == ("./aside/mine.py:Mine",)
    assert profile.resolved is not None
    assert profile.resolved.plugins["./aside/mine.py:Mine"].r == 2  # type: ignore[attr-defined]


def test_a_fault_in_a_base_is_told_where_it_stands(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("d_model: 32", "d_model: -1"))
    assert faults_of(folder, "base: base.yaml\nname: x\n").startswith(
        "base.yaml:3:12: model.d_model: -1 is not allowed"
    )


def test_a_stated_fallback_stands_in_and_is_recorded(folder: Path) -> None:
    profile = load(folder / "base.yaml", sets=["model.attention={provider: flash_v9, fallback: [sdpa]}"])
    assert profile.resolved is not None
    found = next(each for each in profile.resolved.resolutions if each.where == "model.attention")
    assert (found.asked, found.used) == ("flash_v9", "sdpa")
    assert "flash_v9" in found.why


def test_the_canonical_form_is_its_own(folder: Path) -> None:
    config = load(folder / "base.yaml", sets=["extra.mine={x: [1, {y: 2}]}", "model.attention.fallback=[sdpa]"]).config
    (folder / "again.yaml").write_text(dump_profile(config))
    assert load(folder / "again.yaml").config == config


def test_a_choice_is_a_name_or_a_mapping() -> None:
    assert to_choice("sdpa").provider == "sdpa"
    assert to_choice({"provider": "a", "fallback": "b", "r": 1}).model_dump() == {
        "provider": "a",
        "fallback": ("b",),
        "options": {"r": 1},
    }
    for wrong in (3, None, [1], {"provider": 3}, {"provider": "a", "fallback": {"b": 1}}):
        with pytest.raises(ValueError, match="provider"):
            to_choice(wrong)  # type: ignore[arg-type]


def test_what_the_predecessor_had_and_nothing_reads_is_not_offered_as_an_option(folder: Path) -> None:
    told = faults_of(folder, "model: {d_modl: 3}\n")
    assert "did you mean 'd_model'?" in told
    assert "dbc_iterations" not in told
    assert "router_name" not in told
