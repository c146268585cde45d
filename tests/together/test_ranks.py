"""Two processes train what one does, go on where the other left off, and do not outlive one another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from apt.cli import main
from apt.core.config import APTConfig
from apt.core.profile import dump_profile
from apt.errors import CheckpointError
from apt.training.checkpoint import list_checkpoints, load_run, read_saved, verify
from apt.training.holding import is_empty
from apt.training.record import read_metrics
from apt.training.weights import use_weights

pytestmark = pytest.mark.timeout(900)  # a busy machine is no fault of the code
thorough = pytest.mark.thorough
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def profile(tiny: APTConfig, tmp_path: Path) -> Path:
    """Fifty-two steps: experts on at step 13, alignment at step 26; what is drawn would differ between ranks, so nothing is."""
    training = tiny.training.model_copy(update={"steps_per_epoch": 13, "save_every": 13, "keep_last": 10})
    hardware = tiny.hardware.model_copy(update={"parallel": "ddp"})
    path = tmp_path / "profile.yaml"
    path.write_text(dump_profile(tiny.model_copy(update={"training": training, "hardware": hardware})))
    return path


DDP, FSDP = ["--set", "hardware.parallel=ddp"], ["--set", "hardware.parallel=fsdp"]
EXPERTS = ["--set", "hardware.expert_parallel=2"]
both = pytest.mark.parametrize("parallel", [pytest.param(DDP, marks=thorough), FSDP], ids=["ddp", "fsdp"])
every = pytest.mark.parametrize(
    "parallel",
    [
        *(pytest.param(DDP, id="ddp", marks=thorough), pytest.param(FSDP, id="fsdp")),
        *(
            pytest.param(DDP + EXPERTS, id="ddp+experts", marks=thorough),
            pytest.param(FSDP + EXPERTS, id="fsdp+experts", marks=thorough),
        ),
    ],
)


def command(ranks: int, profile: Path, out: Path, *words: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "apt", "train", "-p", str(profile), "--out", str(out), *words]


def train(ranks: int, profile: Path, out: Path, *words: str) -> str:
    done = subprocess.run(
        command(ranks, profile, out, *words), capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curve(out: Path) -> list[tuple[int, float]]:
    return [(int(each["step"]), float(each["loss"])) for each in read_metrics(out) if each["event"] == "train"]  # type: ignore[call-overload,arg-type]


@every
def test_two_ranks_train_what_one_does_over_both_switches(profile: Path, tmp_path: Path, parallel: list[str]) -> None:
    train(1, profile, tmp_path / "one")
    said = train(2, profile, tmp_path / "two", *parallel)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 53))
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-5
    for event, value in (("evaluation", "loss"), ("switch", "loss_after"), ("train", "gradient_norm")):
        seen = [
            [each[value] for each in read_metrics(out) if each["event"] == event]
            for out in (tmp_path / "one", tmp_path / "two")
        ]
        assert seen[0] == pytest.approx(seen[1], abs=1e-5, rel=1e-4)
    switches = [each for each in read_metrics(tmp_path / "two") if each["event"] == "switch"]
    assert [each["plugin"] for each in switches] == ["moe", "align"]
    assert all(abs(float(each["change"])) < 1e-5 for each in switches)  # type: ignore[arg-type]
    assert said.count("held-out loss:") == 1
    # And one goes on from what two have saved.
    train(1, profile, tmp_path / "rest", "--resume", str(tmp_path / "two" / "step-000026"))
    whole, rest = (load_run(tmp_path / name).model.state_dict() for name in ("one", "rest"))
    for name, tensor in whole.items():
        torch.testing.assert_close(rest[name], tensor, atol=1e-4, rtol=1e-3)


@thorough
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((1, []), (2, FSDP)),
        ((2, FSDP), (2, FSDP)),
        ((2, FSDP), (2, DDP)),
        ((2, DDP), (2, DDP)),
        ((2, DDP), (3, FSDP)),
        ((1, []), (2, FSDP + EXPERTS)),
        ((2, FSDP + EXPERTS), (2, DDP)),
        ((2, DDP + EXPERTS), (2, DDP + EXPERTS)),
    ],
    ids=lambda each: f"{each[0]}{''.join(each[1]).replace('--set', '').replace('hardware.', ' ')}",
)
def test_a_run_goes_on_with_other_ranks(
    profile: Path, tmp_path: Path, first: tuple[int, list[str]], then: tuple[int, list[str]]
) -> None:
    words = ["--set", "training.optimizer=muon"] if first == then else ["--set", "training.batch_size=6"]
    train(first[0], profile, tmp_path / "whole", *words, *first[1])
    checkpoint = tmp_path / "whole" / "step-000026"
    train(then[0], profile, tmp_path / "rest", "--resume", str(checkpoint), *words, *then[1])
    whole, rest = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "rest"))
    for name, tensor in whole.items():
        if first == then:
            assert torch.equal(rest[name], tensor)
        else:
            torch.testing.assert_close(rest[name], tensor, atol=1e-4, rtol=1e-3)


TAUGHT = [
    *("--set", "model.align={provider: mean_teacher, decay: 0.99, weight: 10.0}"),
    *("--set", "schedules.enable_align_at_epoch=null", "--set", "schedules.align_weight=null"),
    *("--set", "training.batch_size=12"),
]


def taught(out: Path) -> dict[int, tuple[float, float]]:
    """The loss of each step, and the teacher's part of it."""
    steps = [each for each in read_metrics(out) if each["event"] == "train"]
    return {int(each["step"]): (float(each["loss"]), float(each["loss_align"])) for each in steps}  # type: ignore[call-overload,arg-type]


def weights_of(out: Path, name: str) -> dict[str, torch.Tensor]:
    run = load_run(out)
    use_weights(run.folder, run.model, name)
    return run.model.state_dict()


@thorough
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, FSDP), (3, FSDP), (2, FSDP + EXPERTS), (2, DDP + EXPERTS)],
    ids=["fsdp", "fsdp of three", "fsdp+experts", "ddp+experts"],
)
def test_the_average_that_teaches_ranks_is_that_of_one_and_goes_on_as_it_was(
    profile: Path, tmp_path: Path, ranks: int, parallel: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(1, profile, tmp_path / "one", *TAUGHT)
    train(ranks, profile, tmp_path / "many", *TAUGHT, *parallel)
    one, many = taught(tmp_path / "one"), taught(tmp_path / "many")
    assert len(one) == 52
    assert many == {step: pytest.approx(losses, abs=1e-5) for step, losses in one.items()}
    assert max(align for _, align in many.values()) > 1e-3
    checkpoint = tmp_path / "many" / "step-000026"
    assert len(list((checkpoint / "extra.parts").iterdir())) == ranks
    train(ranks, profile, tmp_path / "rest", "--resume", str(checkpoint), *TAUGHT, *parallel)
    train(1, profile, tmp_path / "alone", "--resume", str(checkpoint), *TAUGHT)
    train(ranks, profile, tmp_path / "split", "--resume", str(tmp_path / "one" / "step-000026"), *TAUGHT, *parallel)
    for name in ("alone", "split"):
        # No further: rounding may at last send a token to another expert.
        for step, losses in list(taught(tmp_path / name).items())[:5]:
            assert losses == pytest.approx(one[step], abs=1e-5)
    for name in ("trained", "ema"):
        expected, found = weights_of(tmp_path / "one", name), weights_of(tmp_path / "many", name)
        rest = weights_of(tmp_path / "rest", name)
        for key, value in expected.items():
            assert torch.equal(rest[key], found[key])
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)
    said = []
    for name in ("one", "many"):
        assert main(["generate", str(tmp_path / name), "--weights", "ema", "--prompt", "def f1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@thorough
def test_four_ranks_of_which_two_share_the_experts_train_what_one_does(profile: Path, tmp_path: Path) -> None:
    words = ["--set", "training.max_steps=20", "--set", "schedules.enable_align_at_epoch=null"]
    train(1, profile, tmp_path / "one", *words)
    train(4, profile, tmp_path / "four", *words, *DDP, *EXPERTS)
    pairs = zip(curve(tmp_path / "one"), curve(tmp_path / "four"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


@thorough
def test_a_split_checkpoint_keeps_every_promise_of_a_whole_one(profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--set", "training.async_save=true", "--set", "training.keep_best=true", "--set", "training.keep_last=2"]
    train(2, profile, out, *FSDP, *words)
    folder = out / (out / "latest").read_text().strip()
    written = json.loads((folder / "manifest.json").read_text())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*written, "manifest.json"}
    parts = sorted(name for name in there if ".parts/" in name)
    assert [name.partition("/")[0] for name in parts] == ["model.parts"] * 2 + ["optimizer.parts"] * 2
    assert {Path(name).suffix for name in there} == {".safetensors", ".json", ".yaml"}
    verify(folder)
    damaged = folder / parts[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=rf"damaged \({parts[1]}\); use the one before"):
        load_run(out)


@thorough
@both
def test_micro_batches_of_two_ranks_are_one_large_batch(profile: Path, tmp_path: Path, parallel: list[str]) -> None:
    words = ["--set", "training.accumulate=2", "--set", "training.max_steps=20"]
    train(1, profile, tmp_path / "one", *words)
    train(2, profile, tmp_path / "two", *words, *parallel)
    pairs = zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


@thorough
def test_parts_of_every_kind_train_when_split(profile: Path, tmp_path: Path) -> None:
    # autopoietic has a parameter of a single number, which cannot be split; a bias router keeps counts; bf16 casts.
    words = ["--set", "model.attention.provider=autopoietic", "--set", "training.max_steps=20"]
    words += ["--set", "model.ffn.router.provider=sigmoid_bias", "--set", "model.ffn.router.top_k=2"]
    words += ["--set", "schedules={enable_moe_at_epoch: 1}", "--set", "model.align.state=dropout"]
    words += ["--set", "model.dropout=0.1", "--set", "training.precision=bf16", "--set", "training.recompute=true"]
    train(2, profile, tmp_path / "two", *words, *FSDP)
    assert load_run(tmp_path / "two").state.step == 20


@thorough
@both
def test_all_ranks_compute_by_what_the_first_one_found_and_go_on_so(
    profile: Path, tmp_path: Path, parallel: list[str]
) -> None:
    words, out = ["--set", "hardware.matmul=auto", *parallel], tmp_path / "run"
    said = train(2, profile, out, *words, "--set", "training.max_steps=13")
    assert said.count("matmul: products by") == 1
    found = json.loads((out / "record.json").read_text())["calibration"]
    assert found["figures"]
    train(2, profile, out, *words, "--set", "training.max_steps=20", "--resume", "auto")
    (first, *_, last) = list_checkpoints(out)
    for checkpoint in (first, last):
        assert read_saved(checkpoint)["progress"]["calibration"] == found


def start(profile: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    long = command(2, profile, out, *words, "--set", "training.steps_per_epoch=3000", "--set", "training.save_every=20")
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not list_checkpoints(out):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("parallel", [DDP, pytest.param(FSDP, marks=thorough)], ids=["ddp", "fsdp"])
def test_a_rank_that_dies_ends_the_run_with_its_name(profile: Path, tmp_path: Path, parallel: list[str]) -> None:
    process = start(profile, tmp_path / "run", *parallel)
    workers = [each for each in psutil.Process(process.pid).children() if "apt" in each.cmdline()]
    victim = next(each for each in workers if each.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=300)[0]
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    assert "rank      : 1" in output
    assert f"Signal {signal.SIGKILL.value} (SIGKILL) received by PID {victim.pid}" in output


@thorough
@both
def test_all_ranks_stop_at_the_same_step_and_save(profile: Path, tmp_path: Path, parallel: list[str]) -> None:
    process = start(profile, tmp_path / "run", *parallel)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    run = load_run(tmp_path / "run")
    assert f"stopped at step {run.state.step}; saved in" in said
    assert 20 <= run.state.step < 12_000


@thorough
def test_a_stop_that_comes_while_one_rank_alone_is_writing_a_sample_is_agreed_on(profile: Path, tmp_path: Path) -> None:
    out, samples = (
        tmp_path / "run",
        ["evaluation.samples=true", "evaluation.sample_tokens=1500", "evaluation.eval_every=20"],
    )
    process = start(profile, out, *DDP, *(word for each in samples for word in ("--set", each)))
    deadline = time.monotonic() + 300
    scored = len([event for event in read_metrics(out) if event["event"] == "evaluation"])
    while len([event for event in read_metrics(out) if event["event"] == "evaluation"]) == scored:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    run = load_run(out)
    assert f"stopped at step {run.state.step}; saved in" in said
    assert run.state.step % 20 == 0


@thorough
def test_a_start_that_does_not_go_with_the_profile_is_refused(profile: Path, tmp_path: Path) -> None:
    for words, message in (
        (
            ["--set", "hardware.parallel=none"],
            "hardware.parallel: none, but torchrun started 2 processes; set ddp or fsdp",
        ),
        (["--set", "hardware.expert_parallel=3"], "hardware.expert_parallel: 3 does not divide the 2 processes"),
        (
            [*EXPERTS, "--set", "model.ffn.experts=5"],
            "5 experts cannot be shared out evenly among 2 ranks",
        ),
        (["--set", "training.batch_size=3"], "training.batch_size: 3 is not a multiple of the 2 processes"),
    ):
        done = subprocess.run(
            command(2, profile, tmp_path / "run", *words), capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        assert done.returncode != 0
        assert message in done.stderr
    assert is_empty(tmp_path / "run")  # torchrun may end rank 0 before it has removed the folder


SCRIPT = """
import os, sys
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.core.registry import registry
from apt.errors import AptError
from apt.hookspecs import hookimpl
from apt.training.ranks import join_ranks, leave
from apt.training.trainer import Trainer


class Uneven(Plugin):
    \"\"\"Counts few targets where a row begins with a small id, and adds a loss that is no number on rank 1 at step 3.\"\"\"

    bad: bool = False

    @hookimpl
    def apt_batch_prepare(self, batch):
        batch.mask = batch.tokens >= batch.tokens[:, :1]

    @hookimpl
    def apt_loss_extra(self, state, output):
        if self.bad:
            bad = state.step == 3 and os.environ.get("RANK") == "1"
            return {"own": output.logits.mean() * (float("nan") if bad else 1e-3)}


registry.register("plugin", "uneven", Uneven)
sets = sys.argv[3:]
if sets == ["disagree"]:
    with join_ranks(load_profile(sys.argv[1]).config) as ranks:
        ranks.check_equal("the providers (their lock)", f"hash-{ranks.rank}")
loaded = load_profile(sys.argv[1], sets=sets)
try:
    Trainer(loaded.config, sys.argv[2], resolved=loaded.resolved).fit()
except AptError as error:
    print(type(error).__name__, error)
    leave(1)
leave(0)
"""


def run_script(ranks: int, profile: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launch, str(script), str(profile), str(out), *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        timeout=400,
    )


UNEVEN = [
    *("plugins=[moe, uneven]", "model.align=null", "training.max_steps=20"),
    *("schedules.enable_align_at_epoch=null", "schedules.align_weight=null"),
]


@thorough
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_where_ranks_count_different_numbers_of_tokens_all_count_alike(
    profile: Path, tmp_path: Path, parallel: str
) -> None:
    one = run_script(1, profile, tmp_path / "one", *UNEVEN, "training.accumulate=2")
    two = run_script(2, profile, tmp_path / "two", *UNEVEN, "training.accumulate=2", f"hardware.parallel={parallel}")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    pairs = zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


@thorough
def test_a_number_that_is_not_finite_on_one_rank_stops_all_with_its_name(profile: Path, tmp_path: Path) -> None:
    done = run_script(2, profile, tmp_path / "run", *UNEVEN, "plugins=[moe, {uneven: {bad: true}}]")
    assert done.returncode != 0
    told = (
        "step 3: the loss or its gradient is not finite (micro-batches 3 to 3 of seed 0, rank 1): every part's output"
    )
    assert done.stdout.count(told) == 2
    assert "in the added loss 'own'" in done.stdout


@thorough
def test_ranks_that_do_not_have_the_same_providers_do_not_start(profile: Path, tmp_path: Path) -> None:
    done = run_script(2, profile, tmp_path / "run", "disagree")
    assert done.returncode != 0
    assert "the ranks of this run do not agree on the providers (their lock): rank 0 on" in done.stderr
