from __future__ import annotations

import io
import logging
import math
import sys

import pytest
from rich.console import Console

from mpsdk.report import Callback, Reporter
from mpsdk.report.display import duration, quantity

START = {
    "event": "start",
    "step": 0,
    "steps": 1000,
    "parameters": 836_352,
    "world_size": 4,
    "plan_hash": "3f2a91cc88d1",
    "tokens_per_step": 8192,
}


def log_event(step: int, loss: float = 2.5) -> dict:
    return {
        "event": "log",
        "step": step,
        "loss": loss,
        "learning_rate": 3e-4,
        "grad_norm": 0.8,
        "tokens": step * 8192,
        "tokens_per_second": 48_123.0,
        "step_seconds": 0.17,
        "peak_memory_bytes": 432_000_000,
    }


def events() -> list[dict]:
    return [
        START,
        log_event(10, 5.25),
        log_event(500, 2.75),
        {"event": "evaluate", "step": 500, "loss": 2.875, "tokens": 100_000},
        {"event": "checkpoint", "step": 500, "path": "runs/demo/step-00000500"},
        log_event(1000, 2.5),
        {"event": "end", "step": 1000, "reason": "finished"},
    ]


def shown(tmp_path, sequence, *, terminal: bool, width: int = 120) -> str:
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=terminal, width=width, color_system=None, legacy_windows=False
    )
    reporter = Reporter(tmp_path, console=console)
    for event in sequence:
        reporter.handle(event)
    reporter.close()
    return output.getvalue()


def test_plain_lines_stand_in_columns(tmp_path):
    lines = shown(tmp_path, events(), terminal=False).splitlines()
    assert lines[0] == "836k parameters, 4 ranks, 8,192 tokens a step, plan 3f2a91cc"
    logged = [line for line in lines if "learning rate" in line]
    assert len(logged) == 3
    assert len({line.index("tokens/s") for line in logged}) == 1
    assert logged[0].startswith("step    10/1,000  loss   5.2500  grad norm    0.800  learning rate 3.00e-04")
    assert "step   500/1,000  validation loss 2.8750" in lines
    assert "step   500/1,000  checkpoint runs/demo/step-00000500" in lines
    assert lines[-1].startswith("1,000 steps in 0:00, loss 2.5000, validation 2.8750, checkpoint runs/demo")


@pytest.mark.parametrize(
    ("measures", "shown_as"),
    [
        ({"tokens": 9, "perplexity": 17.725}, "2.8750, perplexity 17.7250"),
        ({"tokens": 9, "perplexity": 1.5e43}, "2.8750, perplexity 1.500e+43"),
        ({"tokens": 9, "perplexity": math.inf}, "2.8750, perplexity -"),
        (
            {"labels": 9, "accuracy": 0.875, "f1_macro": 0.5, "f1": 0.25},
            "2.8750, accuracy 0.8750, F1 macro 0.5000, F1 0.2500",
        ),
    ],
)
def test_an_evaluation_is_shown_with_all_that_it_measured(tmp_path, measures, shown_as):
    event = {"event": "evaluate", "step": 500, "loss": 2.875, **measures}
    lines = shown(tmp_path, [START, event], terminal=False).splitlines()
    assert lines[1] == f"step   500/1,000  validation loss {shown_as}"
    assert f"validation {shown_as}" in shown(tmp_path, [START, event], terminal=True)


def test_columns_stay_in_place_where_a_gradient_norm_was_not_finite(tmp_path):
    skipped = {**log_event(500), "grad_norm": None, "tokens_per_second": 9.0}
    lines = shown(tmp_path, [START, log_event(10), skipped], terminal=False).splitlines()
    assert "grad norm        -  learning rate" in lines[2]
    assert lines[1].index("learning rate") == lines[2].index("learning rate")
    assert lines[1].index("tokens/s") == lines[2].index("tokens/s")


@pytest.mark.parametrize("terminal", [False, True])
def test_run_with_nothing_left_to_do_says_so(tmp_path, terminal):
    sequence = [{**START, "step": 1000}, {"event": "end", "step": 1000, "reason": "finished"}]
    output = shown(tmp_path, sequence, terminal=terminal)
    assert "nothing to train: at step 1,000 already, of 1,000" in output


def test_plain_output_holds_no_control_characters_and_wraps_no_line(tmp_path):
    output = shown(tmp_path, events(), terminal=False, width=40)
    assert "\x1b" not in output and "\r" not in output
    assert len(output.splitlines()) == len(events())


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_terminal_line_fits_the_width_and_says_the_most_important_first(tmp_path, width):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, color_system=None)
    reporter = Reporter(tmp_path, console=console)
    for event in events()[:4]:
        reporter.handle(event)
    line = Console(file=output, width=width, color_system=None)
    output.truncate(0)
    output.seek(0)
    line.print(reporter._display._line())  # type: ignore[attr-defined]
    (text,) = output.getvalue().splitlines()
    reporter.close()
    assert len(text.rstrip()) <= width
    wanted = {
        120: ["500/1,000", "loss 2.7500", "validation 2.8750", "48.1k tokens/s", "left"],
        80: ["loss", "left"],
    }
    assert all(word in text for word in wanted.get(width, []))


def test_terminal_keeps_heading_evaluations_and_summary(tmp_path):
    output = shown(tmp_path, events(), terminal=True)
    assert "836k parameters" in output
    assert "  step   500   loss 2.7500   validation 2.8750" in output
    assert "1,000 steps in 0:00" in output
    assert output.endswith("\n")


def test_terminal_cut_off_by_a_failure_still_tells_how_far_it_came(tmp_path):
    output = shown(tmp_path, events()[:3], terminal=True)
    assert "cut off at step 500 of 1,000" in output
    assert "0/0" not in output
    assert "\x1b[?25h" in output  # the cursor is back


def test_callbacks_are_told_everything_and_one_can_stop_the_run(tmp_path):
    told: list[tuple[str, object]] = []

    class Recorder(Callback):
        def on_start(self, event):
            told.append(("start", event["steps"]))

        def on_log(self, row):
            told.append(("log", row["step"]))
            return "stop" if row["loss"] < 3 else None

        def on_evaluate(self, row):
            told.append(("evaluate", row))

        def on_checkpoint(self, event):
            told.append(("checkpoint", event["path"]))

        def on_end(self, event):
            told.append(("end", event["reason"]))

    reporter = Reporter(tmp_path, [Recorder(), Callback()], Console(file=io.StringIO()))
    answers = [reporter.handle(event) for event in events()]
    reporter.close()
    assert answers == [None, None, "stop", None, None, "stop", None]
    assert told == [
        ("start", 1000),
        ("log", 10),
        ("log", 500),
        ("evaluate", {"step": 500, "validation_loss": 2.875}),
        ("checkpoint", "runs/demo/step-00000500"),
        ("log", 1000),
        ("end", "finished"),
    ]


def test_event_of_a_later_version_is_left_out_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        shown(tmp_path, [START, {"event": "rebalance", "step": 3}], terminal=False)
    assert "rebalance" in caplog.text


def test_curves_are_readable_by_tensorboard_and_a_resumed_run_replaces_what_it_makes_again(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown(tmp_path, [START, log_event(10, 5.0), log_event(20, 4.0), log_event(30, 3.0)], terminal=False)
    resumed = [
        {**START, "step": 20},
        {"event": "resume", "step": 20, "path": "c"},
        log_event(30, 2.0),
        *events()[3:],
    ]
    shown(tmp_path, resumed, terminal=False)
    curves = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss")] == [
        (10, 5),
        (20, 4),
        (30, 2),
        (1000, 2.5),
    ]
    assert [(point.step, point.value) for point in curves.Scalars("validation_loss")] == [(500, 2.875)]
    assert set(curves.Tags()["scalars"]) == {
        "loss",
        "validation_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_bytes",
    }


def test_without_tensorboard_everything_else_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    assert "1,000 steps" in shown(tmp_path, events(), terminal=False)
    assert not (tmp_path / "tensorboard").exists()


def test_quantities_and_durations_read_like_a_person_writes_them():
    assert [quantity(number) for number in (0, 12, 999, 1000, 48_123, 836_352, 7.24e9, 3e15)] == [
        "0",
        "12",
        "999",
        "1k",
        "48.1k",
        "836k",
        "7.24G",
        "3P",
    ]
    assert [duration(seconds) for seconds in (0, 59.7, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
