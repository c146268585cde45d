"""Loggers are told what `metrics.jsonl` is told; what they wrote is read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from apt.builtin.loggers import MLflow, TensorBoard, WandB
from apt.core.providers import LoggerProvider
from apt.core.providers.logger import scalars
from apt.errors import UserError

EVENTS: tuple[dict[str, object], ...] = (
    {"event": "train", "step": 1, "epoch": 0, "split": "train", "loss": 2.5, "values": {"route_temp": 1.5}},
    {"event": "evaluation", "step": 1, "epoch": 0, "loss": 2.25, "bits_per_byte": None, "moe_load": [0.25, 0.75]},
    {"event": "sample", "step": 1, "epoch": 0, "text": "def café():"},
    {"event": "train", "step": 2, "epoch": 0, "split": "train", "loss": 2.0, "values": {"route_temp": 1.25}},
)
PROFILE = {"name": "x", "model": {"d_model": 64, "attention": {"provider": "sdpa"}}}


def tell(provider: LoggerProvider, folder: Path) -> None:
    """A run of two steps that was killed, and goes on from its first."""
    logger = provider.open(folder, PROFILE, None)
    for event in EVENTS:
        logger.log(event)
    logger.close()
    logger = provider.open(folder, PROFILE, 1)
    logger.log({**EVENTS[3], "loss": 1.75})
    logger.close()


def test_every_number_of_an_event_has_a_name() -> None:
    event: Mapping[str, object] = {
        **EVENTS[1],
        "values": {"a": 1},
        "table": [[1, 2.5], [None, 4]],
        "plugins_on": ["moe"],
    }
    assert dict(scalars(event)) == {
        "evaluation/loss": 2.25,
        "evaluation/moe_load/0": 0.25,
        "evaluation/moe_load/1": 0.75,
        "evaluation/table/0/0": 1.0,
        "evaluation/table/0/1": 2.5,
        "evaluation/table/1/1": 4.0,
        "schedule/a": 1.0,
    }


def test_tensorboard_holds_numbers_and_texts_and_forgets_what_was_taken_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard(), tmp_path)
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in seen.Scalars("train/loss")] == [(1, 2.5), (2, 1.75)]
    assert [each.value for each in seen.Scalars("schedule/route_temp")] == [1.5, 1.25]
    assert [each.value for each in seen.Scalars("evaluation/moe_load/1")] == [0.75]
    (sample,) = seen.Tensors("sample/text/text_summary")
    assert sample.tensor_proto.string_val[0].decode() == "def café():"
    assert '"d_model": 64' in seen.Tensors("profile/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_forgets_where_a_run_goes_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoard().open(tmp_path, PROFILE, None)
    for step in (1, 2, 3):
        logger.log({**EVENTS[0], "step": step})
    logger.go_back(1)  # type: ignore[attr-defined]
    logger.log({**EVENTS[0], "step": 2, "loss": 1.75})
    logger.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in seen.Scalars("train/loss")] == [(1, 2.5), (2, 1.75)]
    assert seen.Tensors("profile/text_summary")


def test_tensorboard_forgets_a_run_that_was_killed_before_it_had_saved_anything(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (2.5, 2.25):
        logger = TensorBoard().open(tmp_path, PROFILE, None)
        logger.log({**EVENTS[0], "loss": loss})
        logger.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in seen.Scalars("train/loss")] == [(1, 2.25)]


def test_wandb_keeps_a_run_offline_and_goes_on_with_the_same(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    tell(WandB(mode="offline", project="ours"), tmp_path)
    identity = (tmp_path / "wandb-run.txt").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {path.stem for path in files} == {f"run-{identity}"}
    first, second = (path.read_bytes() for path in files)
    for name in (b"train/loss", b"schedule/route_temp", b"evaluation/moe_load/1", b"sample/text"):
        assert name in first
    assert b"2.5" in first
    assert b"1.75" in second
    assert b"evaluation" not in second


def test_mlflow_holds_profile_and_numbers_and_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "store").as_uri()
    tell(MLflow(tracking_uri=store, experiment="ours"), tmp_path)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow-run.txt").read_text().strip()
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "x", "model.d_model": "64", "model.attention.provider": "sdpa"}
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (1, 2.5),
        (2, 2.0),
        (2, 1.75),
    ]
    assert run.data.tags["sample/text/00000001"] == "def café():"
    with pytest.raises(UserError, match=r"monitoring.loggers: mlflow: .*nonsense"):
        MLflow(tracking_uri="nonsense://x").open(tmp_path, PROFILE, None)
