"""What ``generate --rag`` says of the passages that it used, or could not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt.cli import main
from apt.core.config import APTConfig
from apt.core.profile import dump_profile


@pytest.mark.parametrize(
    ("context", "said"),
    [
        (128, "passages from: zebra.txt"),
        (32, "was used: none bears on the prompt, or none fits in the 16 characters"),
    ],
)
def test_passages_are_named_or_it_is_said_that_there_are_none(
    tiny: APTConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], context: int, said: str
) -> None:
    training = tiny.training.model_copy(update={"max_steps": 1, "steps_per_epoch": 1})
    evaluation = tiny.evaluation.model_copy(update={"max_batches": 1})
    config = tiny.model_copy(
        update={
            "max_seq_len": context,
            "training": training,
            "evaluation": evaluation,
            "plugins": (),
            "schedules": {},
            "warmup_steps": 0,
            "ffn_name": "default",
            "options": {"attention": tiny.options["attention"]},
        }
    )
    profile, folder = tmp_path / "profile.yaml", tmp_path / "texts"
    profile.write_text(dump_profile(config))
    folder.mkdir()
    (folder / "zebra.txt").write_text("The zebra protocol handles retries.")
    assert main(["train", "-p", str(profile), "--out", str(tmp_path / "run")]) == 0
    words = ["generate", str(tmp_path / "run"), "--prompt", "zebra", "--max-new-tokens", "2", "--rag", str(folder)]
    assert main(words) == 0
    assert said in capsys.readouterr().err
    # Of several prompts it is said of which.
    assert main([*words, "--prompt", "zebras"]) == 0
    told = capsys.readouterr().err
    assert all(f"[{number}] " in line and said in line for number, line in enumerate(told.splitlines()[:2], 1))
    # A prompt that fills the context pushes out what was put before it.
    filling = "zebra " * (context // 6)
    assert main([*words[:3], filling, *words[4:]]) == 0
    told = capsys.readouterr().err
    assert ("tokens, the passages' before all others, did not fit in the model's context" in told) == (context == 128)
