"""The plugin beside those of other packages: the predecessor's profile, and a run of all of it that writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("apt_moe", reason="the other packages are not installed")
pytest.importorskip("apt_align", reason="the other packages are not installed")
pytest.importorskip("apt_attention_tva", reason="the other packages are not installed")

from apt_voter.provider import Voter

from apt.cli import main
from apt.core.profile import load_profile
from apt.inference.generate import generate
from apt.training.checkpoint import load_run
from apt.training.trainer import Trainer

PROFILES = Path(__file__).parents[1] / "profiles"


def test_the_predecessors_profile_loads_with_all_that_it_says() -> None:
    # TensorBoard, which it asks for, is an extra: the providers are resolved without it.
    path = PROFILES / "gpt5_moe_reasoning.yaml"
    profile, config = load_profile(path, resolve=False), load_profile(path, resolve=False).config
    assert config.plugins == ("moe", "align", "routing", "voter")
    resolved = load_profile(path, sets=["monitoring.tensorboard=false"]).resolved
    assert resolved is not None
    assert resolved.plugins["voter"].model_dump() == Voter(threshold=2.2, k=3).model_dump()
    assert config.training.precision == "bf16"
    assert config.training.keep_best
    assert config.evaluation.eval_every == 500
    assert config.hardware.parallel == "ddp"
    assert config.monitoring.tensorboard
    left_out = [note for note in profile.notes if "is left out" in note]
    moved = [note for note in profile.notes if " is now " in note]
    assert (len(left_out), len(moved)) == (16, 11)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small profile at a smaller size still: every switch in ten steps."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(300)))
    sets = [
        *("model.d_model=32", "model.d_ff=64", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=32"),
        *("model.ffn.experts=4", "training.batch_size=4", "training.steps_per_epoch=2", "training.warmup_steps=2"),
        *(f"data={{source: files, path: '{text}'}}", "evaluation.max_batches=2", "monitoring.plot=false"),
    ]
    config = load_profile(PROFILES / "small.yaml", sets=sets).config
    result = Trainer(config, folder / "out").fit()
    assert result.state.plugins_on == ("moe", "align", "routing", "voter")
    return folder / "out"


def test_generation_votes_by_the_threshold_that_training_ended_with(run: Path) -> None:
    loaded = load_run(run)
    # By epoch the last of six runs at 5/6 of the way from 3.0 to 2.0.
    assert loaded.state.values["vote_threshold"] == pytest.approx(3.0 - 5 / 6)


def test_a_vote_changes_what_is_written_where_the_model_is_unsure(run: Path) -> None:
    from apt.core.hooks import HookRunner
    from apt.hookspecs import RunState

    loaded = load_run(run)

    def written(k: int, threshold: float) -> str:
        state = RunState(0, 0, 0, 0, ("voter",), {"vote_threshold": threshold})
        hooks = HookRunner({"voter": Voter(k=k)})
        return generate(loaded.model, loaded.tokenizer, "def ", max_new_tokens=20, hooks=hooks, state=state).text

    plain = generate(loaded.model, loaded.tokenizer, "def ", max_new_tokens=20).text
    greedy = generate(loaded.model, loaded.tokenizer, "def ", max_new_tokens=20, temperature=0).text
    assert written(k=3, threshold=99.0) == plain
    assert written(k=1, threshold=0.0) not in (plain, greedy)
    # Many votes name the likeliest token where it is the likeliest by enough.
    loaded.model.norm.weight.data.mul_(8)
    assert written(k=2000, threshold=0.0) == greedy


def test_the_command_line_generates_from_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "def ", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")
