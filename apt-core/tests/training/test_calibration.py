"""`hardware.matmul: auto`: what is measured, what is refused, what is kept."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from apt.builtin import flex
from apt.core.config import APTConfig
from apt.core.profile import load_profile
from apt.layers.ways import Shape
from apt.modeling.compose import ModelBuilder
from apt.training import calibration, measuring
from apt.training.calibration import Calibration, Machine, calibrate, calibration_of, settle
from apt.training.checkpoint import list_checkpoints
from apt.training.measuring import Figure
from apt.training.ranks import Ranks
from apt.training.trainer import RunResult, Trainer

SHAPE = Shape("cpu", torch.float32, 2, 2, 16, 16, 8, 8, True, False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.0)


def train(profile: Path, out: Path, *sets: str, resume: str = "never") -> tuple[RunResult, str]:
    loaded = load_profile(profile, sets=["hardware.matmul=auto", *sets])
    console = Console(file=io.StringIO(), width=200)
    result = Trainer(loaded.config, out, resolved=loaded.resolved, resume=resume, console=console).fit()
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def figure(route: str, way: str, milliseconds: float, error: float | None = 3e-7, what: str = "product") -> Figure:
    return Figure(what, route, way, milliseconds, 2, error)


def choose(figures: list[Figure]) -> tuple[str, str]:
    """The route, and the way under it, by figures that are given."""
    ways = {route: {SHAPE: calibration._best_way(SHAPE, route, figures)} for route in ("default", "onednn")}
    totals = {route: calibration._total(figures, route, ways[route], "float32") for route in ways}
    errors = {route: calibration._largest_error(figures, route, ways[route]) for route in ways}
    route = calibration._best_route(totals, errors)
    return route, ways[route][SHAPE]


def attention(route: str, sdpa: float, padded: float, explicit: float, error: float = 3e-7) -> list[Figure]:
    return [
        figure(route, "sdpa", sdpa, what=str(SHAPE)),
        figure(route, "padded", padded, what=str(SHAPE)),
        figure(route, "explicit", explicit, error, what=str(SHAPE)),
    ]


def test_route_and_way_are_chosen_together() -> None:
    default, onednn = attention("default", 4, 2, 6), attention("onednn", 8, 9, 1)
    figures = [figure("default", "float32", 10), figure("onednn", "float32", 6), *default, *onednn]
    assert choose(figures) == ("onednn", "explicit")


def test_a_route_that_gains_too_little_or_errs_too_much_is_not_taken() -> None:
    both = [*attention("default", 4, 2, 6), *attention("onednn", 4, 2, 6)]
    assert choose([figure("default", "float32", 10), figure("onednn", "float32", 9.9), *both]) == ("default", "padded")
    assert choose([figure("default", "float32", 10), figure("onednn", "float32", 2, 2e-3), *both]) == (
        "default",
        "padded",
    )


def test_a_way_that_errs_too_much_is_not_taken() -> None:
    figures = [figure("default", "float32", 10), *attention("default", 4, 3, 1, error=1e-4)]
    figures += [figure("onednn", "float32", 10), *attention("onednn", 4, 3, 1, error=1e-4)]
    assert choose(figures) == ("default", "padded")


def test_what_the_model_does_is_what_is_measured(profile_file: Path) -> None:
    config = load_profile(profile_file).config
    model = ModelBuilder(config).build_model()
    state = torch.get_rng_state()
    measured = calibrate(model, torch.zeros(2, 16, dtype=torch.long), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    products = {each.what: each.count for each in measured.figures if each.what.startswith("product")}
    assert products == {
        "product of 32 x 16 and 16 x 48": 2,
        "product of 32 x 16 and 16 x 16": 2,
        "product of 32 x 16 and 16 x 32": 2,
        "product of 32 x 32 and 32 x 16": 2,
        "product of 32 x 16 and 16 x 259": 1,
    }
    assert set(measured.ways) == {SHAPE}
    assert {each.way for each in measured.figures if each.what == str(SHAPE)} == {"sdpa", "padded", "explicit"}
    assert all(each.error is not None and each.error < 1e-6 for each in measured.figures if each.route == "default")
    assert all(each.milliseconds > 0 for each in measured.figures)
    assert Calibration.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    assert measured.lines[0].startswith("products by ")


def test_looking_at_flex_attention_leaves_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(flex, "_find_kernel", lambda compiled: torch.compile(flex._PLAIN, backend=backend))
    config = APTConfig(
        vocab_size=259, d_model=32, num_heads=2, num_layers=1, d_ff=16, attention_dropout=0.0, attention_name="flex"
    )
    model = ModelBuilder(config).build_model().eval()
    tokens = torch.zeros(2, 8, dtype=torch.long)
    products, _ = measuring.find_shapes(model, tokens, bf16=False)
    assert products[(16, 32, 16)] == 1
    assert len(compiled) == 1
    with torch.no_grad():
        model(tokens)
    assert len(compiled) == 1


def test_bfloat16_is_compared_with_float32_and_has_one_route(profile_file: Path) -> None:
    config = load_profile(profile_file, sets=["training.precision=bf16"]).config
    measured = calibrate(ModelBuilder(config).build_model(), torch.zeros(2, 16, dtype=torch.long), config)
    assert measured.route == "default"
    assert [shape.dtype for shape in measured.ways] == [torch.bfloat16]
    assert {each.way for each in measured.figures} == {"bfloat16", "float32", "sdpa", "padded", "explicit"}
    told = "bfloat16 products take" in " ".join(measured.lines)
    times = [
        sum(each.count * each.milliseconds for each in measured.figures if each.way == name)
        for name in ("bfloat16", "float32")
    ]
    assert told == (times[0] >= times[1])


def refuse(*arguments: object) -> torch.Tensor:
    raise AssertionError("measured, or read")


def test_the_choice_is_printed_recorded_and_kept_to_the_last_bit(profile_file: Path, tmp_path: Path) -> None:
    whole, printed = train(profile_file, tmp_path / "whole")
    assert "matmul: products by" in printed
    assert f"matmul: {SHAPE}: " in printed
    recorded = json.loads((tmp_path / "whole" / "record.json").read_text())["calibration"]
    assert recorded == calibration_of(list_checkpoints(whole.folder)[-1]).to_dict()
    train(profile_file, tmp_path / "parts", "training.max_epochs=1")
    first = list_checkpoints(tmp_path / "parts")[-1]
    chosen = calibration_of(first)
    # As if another way had been chosen: it is kept, whatever would be measured now.
    other = {SHAPE: "explicit" if chosen.ways[SHAPE] != "explicit" else "sdpa"}
    state = json.loads((first / "state.json").read_text())
    kept = Calibration(chosen.machine, "fp32", "default", other, chosen.figures, ("as before",)).to_dict()
    state["progress"]["calibration"] = kept
    config = load_profile(profile_file, sets=["hardware.matmul=auto"]).config
    model = ModelBuilder(config).build_model()
    console = Console(file=io.StringIO(), width=200)
    settled = settle(model, refuse, config, kept, Ranks(), console)
    assert settled.ways == other
    assert settled.lines == ("as before",)


def test_a_resumed_run_ends_with_the_same_bits(profile_file: Path, tmp_path: Path) -> None:
    train(profile_file, tmp_path / "whole", "training.save_every=4", "training.keep_last=9")
    first, last = list_checkpoints(tmp_path / "whole")
    train(profile_file, tmp_path / "again", resume=str(first))
    again = list_checkpoints(tmp_path / "again")[-1]
    left, right = (load_file(folder / "model.safetensors") for folder in (last, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_another_machine_measures_anew_and_says_so(profile_file: Path) -> None:
    config = load_profile(profile_file, sets=["hardware.matmul=auto"]).config
    model, tokens = ModelBuilder(config).build_model(), torch.zeros(2, 16, dtype=torch.long)
    measured = calibrate(model, tokens, config)
    elsewhere = Calibration(Machine("another", 64, "2.0"), "fp32", "onednn", {}, measured.figures, ())
    console = Console(file=io.StringIO(), width=200)
    settled = settle(model, lambda: tokens, config, elsewhere.to_dict(), Ranks(), console)
    assert isinstance(console.file, io.StringIO)
    assert "other conditions and is measured anew" in console.file.getvalue()
    assert settled.machine == Machine.now()


class TwoProcessors(Ranks):
    """Two ranks, the second of which is another machine."""

    def gather(self, value: object) -> list[object]:
        assert isinstance(value, dict)
        return [value, {**value, "machine": {**value["machine"], "processor": "another"}}]


def test_ranks_with_different_processors_take_the_defaults(profile_file: Path) -> None:
    config = load_profile(profile_file, sets=["hardware.matmul=auto"]).config
    model = ModelBuilder(config).build_model()
    tokens, quiet = torch.zeros(2, 16, dtype=torch.long), Console(file=io.StringIO())
    settled = settle(model, lambda: tokens, config, None, TwoProcessors(0, 2), quiet)
    assert (settled.route, settled.ways) == ("default", {})
    assert "different processors" in settled.lines[0]


def test_strict_measures_and_reads_nothing(profile_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "calibrate", refuse)
    config: APTConfig = load_profile(profile_file).config
    model = ModelBuilder(config).build_model()
    settled = settle(model, refuse, config, None, Ranks(), Console(file=io.StringIO()))
    assert (settled.route, settled.ways, settled.figures, settled.lines) == ("default", {}, (), ())


def test_the_route_is_in_force_while_it_is_applied_and_no_longer() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with Calibration(Machine.now(), "fp32", "onednn", {}, (), ()).applied():
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before
