"""Runs on a GPU: what they save, what stops them, ranks over NCCL, and how often they wait for the device."""

from __future__ import annotations

import collections
import io
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt.cli import main
from apt.core.profile import load_profile
from apt.errors import AptError, UserError
from apt.training.checkpoint import find_checkpoint, load_run, load_weights, read_saved
from apt.training.record import read_metrics
from apt.training.step import Step
from apt.training.trainer import RunResult, Trainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and to be asked for: pytest tests/gpu"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]


def fit(profile: Path, out: Path, *sets: str, resume: str = "never", branch: Path | None = None) -> RunResult:
    loaded = load_profile(profile, sets=list(sets))
    quiet = Console(file=io.StringIO())
    return Trainer(loaded.config, out, resolved=loaded.resolved, console=quiet, resume=resume, branch=branch).fit()


def launch(profile: Path, out: Path, *words: str, ranks: bool = True) -> None:
    """Train in a process of its own, or as one rank that `torchrun` starts."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if ranks else []
    done = subprocess.run(
        [sys.executable, *start, "-m", "apt", "train", "-p", str(profile), "--out", str(out), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def curve(out: Path) -> list[float]:
    return [float(each["loss"]) for each in read_metrics(out) if each["event"] == "train"]  # type: ignore[arg-type]


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_run(each).model.state_dict() for each in (one, two))
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_model_saved_on_a_gpu_gives_the_same_scores_on_the_cpu_and_back(profile: Path, tmp_path: Path) -> None:
    result = fit(profile, tmp_path / "run")
    model = result.model.eval()
    assert {each.device.type for each in model.parameters()} == {"cuda"}
    tokens = torch.randint(0, 250, (2, 64))
    loaded = load_run(tmp_path / "run").model
    with torch.no_grad():
        there, here = model(tokens.cuda()).logits.cpu(), loaded(tokens).logits
        assert (there - here).abs().max() < 1e-5
        fresh = load_run(tmp_path / "run").model.cuda()
        load_weights(find_checkpoint(tmp_path / "run"), fresh)
        assert torch.equal(fresh(tokens.cuda()).logits.cpu(), there)


def test_a_run_of_a_gpu_goes_on_on_the_cpu_and_the_other_way_round(profile: Path, tmp_path: Path) -> None:
    for first, then in (("cuda", "cpu"), ("cpu", "cuda")):
        whole, rest = tmp_path / f"{first}-whole", tmp_path / f"{first}-rest"
        fit(profile, whole, f"hardware.device={first}", "model.dropout=0.0")
        fit(profile, rest, f"hardware.device={then}", "model.dropout=0.0", resume=str(whole / "step-000003"))
        assert curve(rest) == pytest.approx(curve(whole)[3:], abs=1e-4)


@pytest.mark.filterwarnings(
    "ignore:.*TensorFloat32 tensor cores", "ignore:.*torch._inductor", "ignore:.*Online softmax"
)
def test_commands_score_and_write_on_the_gpu_what_they_do_on_the_cpu(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(profile, tmp_path / "run").folder
    said = []
    for words in (["--device", "cpu"], ["--device", "cuda"], []):
        assert main(["evaluate", str(run), *words]) == 0
        said.append(float(capsys.readouterr().out.split()[1]))
    assert said == pytest.approx([said[0]] * 3, abs=2e-4)
    words = ["generate", str(run), "--prompt", "def f", "--max-new-tokens", "20", "--temperature", "0"]
    for more in ([], ["--compile"], ["--dtype", "bf16", "--compile"], ["--quantize", "int8"]):
        assert main([*words, *more]) == 0
        assert capsys.readouterr().out.startswith("def f")
    assert main([*words, "--quantize", "int8", "--device", "cuda"]) == 2
    assert "is for the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_run_on_a_gpu_goes_on_to_the_same_bits_with_dropout_and_recomputation(
    profile: Path, tmp_path: Path, precision: str, asynchronous: str
) -> None:
    sets = [f"training.precision={precision}", f"training.async_save={asynchronous}", "training.recompute=true"]
    fit(profile, tmp_path / "whole", *sets)
    fit(profile, tmp_path / "rest", *sets, resume=str(tmp_path / "whole" / "step-000003"))
    assert same_weights(tmp_path / "whole", tmp_path / "rest")
    fit(profile, tmp_path / "branch", *sets, branch=tmp_path / "whole" / "step-000003")
    assert same_weights(tmp_path / "whole", tmp_path / "branch")


def test_a_checkpoint_written_beside_training_on_a_gpu_is_the_one_written_within_it(
    profile: Path, tmp_path: Path
) -> None:
    fit(profile, tmp_path / "within", "training.save_every=1")
    fit(profile, tmp_path / "beside", "training.save_every=1", "training.async_save=true")
    for step in range(1, 7):
        assert same_weights(tmp_path / "within" / f"step-{step:06d}", tmp_path / "beside" / f"step-{step:06d}")


def test_matmul_auto_trains_on_a_gpu_and_says_which_way_attention_takes(profile: Path, tmp_path: Path) -> None:
    for number, attention in enumerate(("sdpa", "flex")):
        out = tmp_path / str(number)
        fit(profile, out, "hardware.matmul=auto", f"model.attention={attention}")
        kept = read_saved(find_checkpoint(out))["progress"]["calibration"]
        assert kept["route"] == "default"
        print(*kept["lines"], sep="\n")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_over_nccl_on_a_gpu_trains_as_one_process_does(
    profile: Path, tmp_path: Path, parallel: str, precision: str
) -> None:
    sets = ["--set", f"training.precision={precision}", "--set", "training.async_save=true"]
    launch(profile, tmp_path / "one", *sets, ranks=False)
    launch(profile, tmp_path / "ranks", *sets, "--set", f"hardware.parallel={parallel}")
    assert curve(tmp_path / "ranks") == pytest.approx(
        curve(tmp_path / "one"), abs=1e-5 if precision == "fp32" else 2e-2
    )
    parts = list((tmp_path / "ranks").glob("step-*/model.parts"))
    assert bool(parts) == (parallel == "fsdp")
    fit(profile, tmp_path / "rest", f"training.precision={precision}", resume=str(tmp_path / "ranks" / "step-000003"))
    assert curve(tmp_path / "rest") == pytest.approx(
        curve(tmp_path / "one")[3:], abs=1e-4 if precision == "fp32" else 2e-2
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_averaged_weights_of_a_rank_over_nccl_are_those_of_one_process(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], parallel: str
) -> None:
    sets = ["plugins=[align]", "model.align={provider: mean_teacher, decay: 0.5}"]
    fit(profile, tmp_path / "one", *sets)
    words = [each for value in (*sets, f"hardware.parallel={parallel}") for each in ("--set", value)]
    launch(profile, tmp_path / "ranks", *words)
    said = []
    for run in ("one", "ranks"):
        for weights in ("trained", "ema"):
            assert main(["evaluate", str(tmp_path / run), "--device", "cuda", "--weights", weights]) == 0
            said.append(float(capsys.readouterr().out.split()[1]))
    assert said[:2] == pytest.approx(said[2:], abs=1e-4)
    assert abs(said[0] - said[1]) > 1e-3, "the average is nothing of its own"


def test_too_little_memory_on_a_gpu_is_told_with_what_to_lower(profile: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    room = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 600 * 2**20 / room))
    try:
        with pytest.raises(UserError, match=r"out of memory \(.*lower training\.batch_size") as caught:
            fit(profile, tmp_path / "run", "model.d_model=2048", "model.d_ff=8192", "evaluation.max_batches=1")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(caught.value)


@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_a_gradient_that_is_not_finite_on_a_gpu_stops_the_run_is_skipped_or_gone_back_from(
    profile: Path, tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = Step._backward, []

    def spoilt(self: Step, *arguments: object, **options: object) -> int:
        tokens = backward(self, *arguments, **options)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 5:
            next(self.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        return tokens

    monkeypatch.setattr(Step, "_backward", spoilt)
    if action == "stop":
        with pytest.raises(AptError, match=r"not finite.*in the gradients of embedding"):
            fit(profile, tmp_path / "run", "training.on_nonfinite=stop")
        return
    result = fit(profile, tmp_path / "run", f"training.on_nonfinite={action}")
    assert result.state.step == 6
    (event,) = [each for each in read_metrics(tmp_path / "run") if each["event"] == "nonfinite"]
    assert event["action"] == action


def test_a_step_on_a_gpu_waits_for_the_device_at_few_places(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, places, steps = Step.take, collections.Counter[str](), 0

    def shown(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if "synchroniz" in str(message).lower():
            ours = [
                each for each in traceback.extract_stack() if "/apt" in each.filename and "tests" not in each.filename
            ]
            last = ours[-1]
            places[f"{Path(last.filename).name}:{last.lineno} {last.line}"] += 1

    def watched(self: Step, *arguments: object, **options: object) -> object:
        nonlocal steps
        steps += 1
        if steps <= 2:  # proofs of use
            return take(self, *arguments, **options)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", shown)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return take(self, *arguments, **options)  # type: ignore[arg-type]
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Step, "take", watched)
    fit(profile, tmp_path / "run", "hardware.deterministic=false")
    print(*(f"{count / 4:g} a step: {place}" for place, count in places.most_common()), sep="\n")
    assert sum(places.values()) / 4 <= 12
