"""Pictures of runs: everything that was recorded is in them, and no text is cut off."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from apt.errors import UserError
from apt.training.plot import _chosen, _draw, _names, _read, _smooth, plot_run, plot_runs


def make_run(folder: Path, *, loads: int = 4, steps: int = 200, switch: int = 80) -> Path:
    folder.mkdir(parents=True)
    events: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        if step == switch:
            events.append({"event": "switch", "step": step, "epoch": 1, "plugin": "moe"})
        loss = 1 + 4 * math.exp(-step / 40)
        values = {"route_temp": 1.5 - step / steps}
        rate = min(step, 20) * 1e-4
        events.append({"event": "train", "step": step, "loss": loss, "learning_rate": rate, "values": values})
        if step % 20 == 0:
            evaluation = {"event": "evaluation", "step": step, "loss": loss + 0.1, "bits_per_byte": 2.0}
            if step > switch:
                evaluation |= {"moe_load": [1 / loads] * loads, "moe_dropped": 0.01}
            events.append(evaluation)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def texts_of(figure: object) -> dict[str, object]:
    from matplotlib.text import Text

    found = figure.findobj(Text)  # type: ignore[attr-defined]
    return {text.get_text(): text for text in found if text.get_text() and text.get_visible()}


def test_a_run_has_its_losses_values_loads_and_switches_and_no_text_is_cut_off(tmp_path: Path) -> None:
    course = _read(make_run(tmp_path / "run"), "run", "#0072B2")
    assert course.held_out[-1] == (200, pytest.approx(1.1, abs=0.05))
    assert course.switches == [(80, "moe")]
    assert [step for step, _ in course.tables["moe_load"]] == [100, 120, 140, 160, 180, 200]
    assert course.measured["moe_dropped"][0] == (100, 0.01)
    figure = _draw([course])
    figure.draw_without_rendering()
    texts = texts_of(figure)
    wanted = {"run", "moe on at step 80", "learning rate", "route_temp", "moe_load", "moe_dropped", "training", "step"}
    assert wanted <= set(texts)
    width, height = figure.bbox.width, figure.bbox.height
    for words, text in texts.items():
        box = text.get_window_extent()  # type: ignore[attr-defined]
        assert -1 <= box.x0 <= box.x1 <= width + 1, words
        assert -1 <= box.y0 <= box.y1 <= height + 1, words


def test_several_runs_are_told_apart_in_one_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, switch=at) for name, at in (("one", 40), ("two", 120))]
    courses = [_read(run, run.name, colour) for run, colour in zip(runs, ("#0072B2", "#D55E00"), strict=True)]
    figure = _draw(courses)
    figure.draw_without_rendering()
    texts = texts_of(figure)
    assert {"moe on at step 40 (one)", "moe on at step 120 (two)", "moe_load\none", "moe_load\ntwo"} <= set(texts)
    ends = [text for words, text in texts.items() if "nats a token\n" in words]
    first, second = (text.get_window_extent() for text in ends)  # type: ignore[attr-defined]
    assert first.y1 <= second.y0 or second.y1 <= first.y0


def test_of_many_blocks_the_mean_and_a_few_from_first_to_last_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in lines:
        if "moe_load" in event:
            event |= {f"moe_load.{block}": event["moe_load"] for block in range(1, 24)}
            event["other.list"] = [1.0, 2.0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    one, two = (_read(run, name, "#0072B2") for name in ("one", "two"))
    drawn = {"moe_load", "moe_load.1", "moe_load.8", "moe_load.16", "moe_load.23", "other.list"}
    assert {name for name in texts_of(_draw([one])) if name.startswith(("moe_load", "other"))} == drawn
    compared = {name for name in texts_of(_draw([one, two])) if name.startswith(("moe_load", "other"))}
    assert compared == {f"{name}\n{run}" for name in ("moe_load", "other.list") for run in ("one", "two")}
    assert _chosen(["load", "load.0"], alone=True) == ["load"]
    assert _chosen(["load", "load.0", "load.1"], alone=True) == ["load", "load.0", "load.1"]


def test_the_file_goes_where_it_is_asked_or_to_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", steps=40, switch=10)
    assert plot_run(run) == run / "loss.png"
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    same = make_run(tmp_path / "a-folder-with-a-name-that-is-rather-long" / "run", steps=40, switch=10)
    assert plot_runs([run, same]) == Path("comparison.png")
    assert _names([run, same])[1] == "…ame-that-is-rather-long/run"
    assert b"<svg" in plot_run(run, tmp_path / "x.svg").read_bytes()[:400]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no metrics.jsonl; give the folder of a run"),
        ("", r"has no step of training in its metrics.jsonl yet"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        plot_run(tmp_path)
    with pytest.raises(UserError, match=r"x.pdf: a picture is .png or .svg"):
        plot_run(tmp_path, tmp_path / "x.pdf")
    with pytest.raises(UserError, match=r"9 runs are too many"):
        plot_runs([tmp_path] * 9)


def test_what_was_measured_once_is_a_dot(tmp_path: Path) -> None:
    figure = _draw([_read(make_run(tmp_path / "run", steps=1), "run", "#0072B2")])
    lines = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
    assert len(lines) == 3
    assert all(line.get_marker() == "." for line in lines)


def test_what_is_damaged_in_the_metrics_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = _read(run, "run", "#0072B2")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = [
        "3",
        "[]",
        "null",
        '{"step": 1}',
        '{"event": "train", "step": 9, "loss": 1.0}',
        '{"event": "switch", "step": 9}',
    ]
    odd += ['{"event": "evaluation", "step": 9}', '{"event": "train", "step": "x"}', '{"event": "train", "loss": "x"}']
    damaged = [b"\xff\xfe\0" + lines[0][:9] + b"\n", *(each.encode() + b"\n" for each in odd)]
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:50], *damaged, *lines[50:], lines[0][:20]]))
    assert _read(run, "run", "#0072B2") == whole


def test_a_mean_over_points_stays_between_them() -> None:
    losses = [float((number * 37) % 11) for number in range(400)]
    smooth = _smooth(losses)
    assert len(smooth) == 400
    assert max(losses) > max(smooth) > min(smooth) > min(losses)
