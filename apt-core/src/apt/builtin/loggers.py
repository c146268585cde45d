"""apt-core's loggers, each behind an extra: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from apt.core.providers import Logger, LoggerProvider
from apt.core.providers.logger import scalars
from apt.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run


class TensorBoard(LoggerProvider):
    """Event files in the folder `tensorboard` of the run: ``tensorboard --logdir runs`` shows them."""

    api_level: ClassVar[int] = 1

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `tensorboard` brings it."""
        return ["tensorboard>=2.16"]

    def open(self, folder: Path, profile: Mapping[str, object], resumed_at: int | None) -> Logger:
        """Begin a file. What a run that begins anew finds there is of one that was killed before it had saved anything."""
        logger = _TensorBoard(folder / "tensorboard", -1 if resumed_at is None else resumed_at)
        if resumed_at is None:
            logger.writer.add_text("profile", f"```json\n{json.dumps(profile, indent=1)}\n```", 0)
        return logger


class _TensorBoard:
    def __init__(self, folder: Path, after: int) -> None:
        self.folder, self.writer = folder, _begin_file(folder, after)

    def go_back(self, step: int) -> None:
        self.writer.close()
        self.writer = _begin_file(self.folder, step)

    def log(self, event: Mapping[str, object]) -> None:
        step = int(str(event["step"]))
        for name, value in scalars(event):
            self.writer.add_scalar(name, value, step)
        for name, text in _texts(event):
            self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


def _begin_file(folder: Path, after: int) -> SummaryWriter:
    """A new file; TensorBoard itself forgets what earlier ones say of steps `after` this one."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after + 1)


class WandB(LoggerProvider):
    """Weights & Biases. Offline, `wandb sync` sends what lies in the run's folder."""

    api_level: ClassVar[int] = 1

    project: str = Field(default="apt", description="the project that the run belongs to")
    entity: str | None = Field(default=None, description="the user or team; none: your default")
    mode: Literal["online", "offline"] = Field(default="online", description="whether the run is sent at once")
    tags: list[str] = Field(default=[], description="words to find the run by")

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `wandb` brings it."""
        return ["wandb>=0.18"]

    def open(self, folder: Path, profile: Mapping[str, object], resumed_at: int | None) -> Logger:
        """Begin a run, or go on with the one whose identity lies in the folder."""
        import wandb

        kept = folder / "wandb-run.txt"
        identity = kept.read_text().strip() if resumed_at is not None and kept.is_file() else None
        try:
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                tags=list(self.tags),
                name=folder.name,
                id=identity,
                resume=None if identity is None else "allow",
                dir=str(folder),
                config=dict(profile),
            )
        except wandb.errors.Error as error:
            raise UserError(f"monitoring.loggers: wandb: {error}; with mode: offline nothing is sent") from error
        kept.write_text(run.id + "\n")
        # A resumed run goes back; W&B's own counter cannot.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return _WandB(run)


class _WandB:
    def __init__(self, run: Run) -> None:
        self.run = run

    def log(self, event: Mapping[str, object]) -> None:
        self.run.log({"step": event["step"], **dict(scalars(event)), **dict(_texts(event))})

    def close(self) -> None:
        self.run.finish()


class MLflow(LoggerProvider):
    """MLflow: the profile as parameters, the numbers as metrics."""

    api_level: ClassVar[int] = 1

    tracking_uri: str | None = Field(
        default=None, description="a server; sqlite:///mlflow.db needs the whole of mlflow; none: MLFLOW_TRACKING_URI"
    )
    experiment: str = Field(default="apt", description="the experiment that the run belongs to")

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `mlflow` brings it."""
        return ["mlflow-skinny>=2.16"]

    def open(self, folder: Path, profile: Mapping[str, object], resumed_at: int | None) -> Logger:
        """Begin a run, or go on with the one whose identity lies in the folder."""
        import mlflow

        kept = folder / "mlflow-run.txt"
        try:
            client = mlflow.MlflowClient(self.tracking_uri)
            if resumed_at is not None and kept.is_file():
                identity = kept.read_text().strip()
                client.update_run(identity, status="RUNNING")
            else:
                found = client.get_experiment_by_name(self.experiment)
                experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
                identity = client.create_run(experiment, run_name=folder.name).info.run_id
                kept.write_text(identity + "\n")
                for name, value in _leaves(profile):
                    client.log_param(identity, name, value)
        except mlflow.MlflowException as error:
            raise UserError(f"monitoring.loggers: mlflow: {error}") from error
        return _MLflow(client, identity)


class _MLflow:
    def __init__(self, client: MlflowClient, identity: str) -> None:
        self.client, self.identity = client, identity

    def log(self, event: Mapping[str, object]) -> None:
        from mlflow.entities import Metric

        step, now = int(str(event["step"])), _milliseconds()
        numbers = [Metric(name, value, now, step) for name, value in scalars(event)]
        for start in range(0, len(numbers), 1000):  # as many as a call may hold
            self.client.log_batch(self.identity, metrics=numbers[start : start + 1000])
        for name, text in _texts(event):
            self.client.set_tag(self.identity, f"{name}/{step:08}", text[:5000])

    def close(self) -> None:
        self.client.set_terminated(self.identity)


def _milliseconds() -> int:
    import time

    return int(time.time() * 1000)


def _texts(event: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What an event has in words: a sample, which plugin was switched on, what went wrong."""
    for key, value in event.items():
        if key != "event" and isinstance(value, str) and value:
            yield f"{event['event']}/{key}", value


def _leaves(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value
