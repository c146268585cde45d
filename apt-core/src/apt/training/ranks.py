"""The processes of one run: `torchrun` starts them, each holds its rank, and rank 0 speaks and writes.

Everything here is what a single process needs too, as one rank of one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Never, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apt.core.config import APTConfig
from apt.errors import AptError, PluginError, UserError, origin_of

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for one that is busy; one that has died is missed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    """What they speak over; None: what all of the process speaks over."""
    started: bool = False
    """Whether `torchrun` started this process, were it the only one: then the model is shared as among several."""

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nothing to share a model among."""
        return self.size == 1 and not self.started

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch [batch, ...]: the r-th of `size` equal parts."""
        rows = batch.shape[0] // self.size
        return batch[self.rank * rows : (self.rank + 1) * rows]

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all ranks of tensors by name, in one call; every rank gives the same names and shapes."""
        if self.size == 1 or not values:
            return dict(values)
        flat = torch.cat([value.detach().double().reshape(-1) for value in values.values()])
        dist.all_reduce(flat, group=self.group)
        parts = torch.split(flat, [value.numel() for value in values.values()])
        return {
            name: part.reshape(value.shape).to(value.dtype)
            for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        told = torch.tensor(float(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return bool(told.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on all of them."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_equal(self, what: str, value: str) -> None:
        """Raise `AptError`, on all ranks, where they do not agree."""
        values = self.gather((value, socket.gethostname()))
        if len({each[0] for each in values}) > 1:
            listed = ", ".join(f"rank {rank} on {each[1]}: {each[0]}" for rank, each in enumerate(values))
            raise AptError(f"the ranks of this run do not agree on {what}: {listed}")

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(self.group)

    def beside(self) -> Ranks:
        """The same ranks with a line of their own, for a thread that works beside training; all ranks call it."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))


ALONE = Ranks()


@contextlib.contextmanager
def join_ranks(config: APTConfig) -> Iterator[Ranks]:
    """This process's rank, from what `torchrun` sets; alone where it was started without.

    Raises `UserError` where the profile does not go with how the process was started.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        among, parallel = config.hardware.expert_parallel, config.hardware.parallel
        if among > 1:
            kind = "ddp" if parallel == "none" else parallel
            raise UserError(
                f"hardware.expert_parallel: {among}, but this is one process; start it with torchrun --nproc-per-node {among} "
                f"-m apt train ... --set hardware.parallel={kind}, or set it to 1"
            )
        if parallel == "none" or not dist.is_torchelastic_launched():
            yield Ranks()
            return
    elif config.hardware.parallel == "none":
        raise UserError(
            f"hardware.parallel: none, but torchrun started {size} processes; set ddp or fsdp, or start it without torchrun"
        )
    batch = config.training.batch_size
    if batch % size:
        raise UserError(
            f"training.batch_size: {batch} is not a multiple of the {size} processes, which share each batch"
        )
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")), started=True)
    on_gpu = config.hardware.device != "cpu" and torch.cuda.is_available()
    if dist.is_initialized():
        yield ranks
        return
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    # Objects and barriers go over gloo, tensors on GPUs over NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield ranks
    except (RuntimeError, PluginError) as error:
        if not _is_lost(origin_of(error)):
            raise
        raise AptError(
            f"rank {ranks.rank} of {size} on {socket.gethostname()}: another rank has died or does not answer "
            f"({str(error).splitlines()[0]}); its own output says why"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):  # where others are gone already
            dist.destroy_process_group()


def leave(code: int) -> Never:
    """End a process that `torchrun` started, with this exit code; a script of your own that trains calls it last.

    What is registered with `atexit` runs and what was printed is written, but the interpreter is not taken down: gloo's
    threads outlive their process group where anything still refers to it, such as DDP or a cached mesh, and one that lets go
    of its last tensor while Python ends aborts the process, whose run was good (pytorch/pytorch#190489).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost(error: BaseException) -> bool:
    """Whether an error is that of a process group that has lost a member."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "Broken pipe")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(word in str(error) for word in words)
    )


def list_unshared(config: APTConfig, ranks: Ranks) -> list[str]:
    """What the profile would share among processes, in one process."""
    if not ranks.is_alone or config.hardware.parallel == "none":
        return []
    return [
        f"hardware.parallel: {config.hardware.parallel}, but this is one process, which trains alone; for N of them: "
        "torchrun --nproc-per-node N -m apt train ..."
    ]
