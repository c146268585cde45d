"""A compiled model is compiled once a phase: schedules move buffers, and no number of blocks or steps compiles anything anew."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.training.record import read_metrics
from apt.training.trainer import Trainer

PAIRS = """\
name: compiled_pairs
model:
  {{architecture: encoder_decoder, d_model: 16, num_heads: 2, num_encoder_layers: 1, num_decoder_layers: 1, d_ff: 24,
   max_seq_len: 16, dropout: 0.0, attention_dropout: 0.0, attention: sdpa}}
training: {{max_steps: 6, batch_size: 4, warmup_steps: 0, compile: true, save_every: 100}}
data: {{source: pairs, path: "{path}"}}
evaluation: {{eval_every: 2, sample_tokens: 0}}
monitoring: {{plot: false}}
"""


@pytest.fixture(params=["aot_eager"])
def counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs; they run eagerly, since what is tested is Dynamo's guards, whatever makes code of its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(request.param)
    whole = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, *args, **kwargs: whole(self, *args, backend=counter, **kwargs)
    )
    return counter


class Counting(Trainer):
    """Notes how many graphs were compiled by the end of each step."""

    graphs: dict[int, int]
    counter: CompileCounterWithBackend

    def _take_step(self) -> None:
        super()._take_step()
        self.graphs[self.state.step] = self.counter.frame_count


@pytest.mark.timeout(900)  # a busy machine is no fault of the code
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*autograd.*should not be instantiated:DeprecationWarning"
)
@pytest.mark.thorough
@pytest.mark.parametrize("counter", ["eager"], indirect=True)
def test_an_encoder_decoder_stays_compiled_whatever_the_lengths_of_its_pairs(
    tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"source": "x" * (n % 7 + 2), "target": "y" * (n % 5 + 2)}) + "\n" for n in range(100))
    )
    (tmp_path / "profile.yaml").write_text(PAIRS.format(path=tmp_path / "pairs.jsonl"))
    profile = load_profile(tmp_path / "profile.yaml")
    trainer = Counting(profile.config, tmp_path / "run", resolved=profile.resolved, console=Console(file=io.StringIO()))
    trainer.graphs, trainer.counter = {}, counter
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=6):
        trainer.fit()
    assert trainer.graphs[6] > 6


@pytest.mark.timeout(900)  # a busy machine is no fault of the code
# What Dynamo provokes by looking, and tells no user of.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*autograd.*should not be instantiated:DeprecationWarning"
)
def test_moving_schedules_compile_nothing_and_a_switch_compiles_once(
    tiny: APTConfig, tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    training = tiny.training.model_copy(update={"compile": True, "save_every": 1000})
    schedules = {
        **tiny.schedules,
        "route_temp": {"start": 1.5, "end": 0.8, "by": "step"},
        "moe_capacity": {"start": 1.5, "end": 1.1, "by": "step"},
    }
    evaluation = tiny.evaluation.model_copy(update={"eval_every": 1000})
    config = tiny.model_copy(
        update={"training": training, "schedules": schedules, "evaluation": evaluation, "num_layers": 10}
    )
    trainer = Counting(config, tmp_path / "compiled", console=Console(file=io.StringIO()))
    trainer.graphs, trainer.counter = {}, counter
    # Above the limit of recompilations a block would run eagerly without a word.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.fit()
    counts = trainer.graphs
    # The first step of each phase runs eagerly, for the proof of use; the second compiles.
    assert 0 < counts[2] == counts[5]
    assert counts[5] < counts[7] == counts[10]
    assert counts[12] == counts[20]
    eager = config.model_copy(update={"training": tiny.training})
    Trainer(eager, tmp_path / "eager", console=Console(file=io.StringIO())).fit()
    losses = [
        [event["loss"] for event in read_metrics(tmp_path / name) if event["event"] == "train"]
        for name in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
