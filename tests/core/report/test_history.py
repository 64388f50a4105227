from __future__ import annotations

import json
import logging
import math

import pytest

from mpsdk.report import History


def test_rows_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "run" / "history.jsonl"
    history = History(path)
    rows = [{"step": 10, "loss": 3.25, "tokens": 81920}, {"step": 10, "validation_loss": 3.5}]
    for row in rows:
        history.append(row)
    assert History.load(path) == rows


def test_history_that_was_never_written_is_empty(tmp_path):
    assert History.load(tmp_path / "history.jsonl") == []


@pytest.mark.parametrize("cut", range(1, 23))
def test_torn_last_line_is_left_out_and_the_next_row_is_whole(tmp_path, cut):
    path = tmp_path / "history.jsonl"
    first, torn = {"step": 1, "loss": 4.0}, json.dumps({"step": 2, "loss": 3.0}) + "\n"
    path.write_text(json.dumps(first) + "\n" + torn[:cut])
    assert History.load(path) == [first]
    History(path).append({"step": 2, "loss": 3.5})
    assert History.load(path) == [first, {"step": 2, "loss": 3.5}]


def test_truncate_drops_what_a_resumed_run_makes_again(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    for step in (10, 20, 30):
        history.append({"step": step, "loss": 1.0})
    history.append({"step": 30, "validation_loss": 1.0})
    history.truncate(20)
    assert [row["step"] for row in History.load(path)] == [10, 20]
    history.append({"step": 30, "loss": 2.0})
    assert History.load(path)[-1] == {"step": 30, "loss": 2.0}
    assert sorted(tmp_path.iterdir()) == [path]


def test_damaged_line_is_left_out_with_its_number(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"st\x00\n[1]\n{"step": 4}\n')
    with caplog.at_level(logging.WARNING):
        assert History.load(path) == [{"step": 1}, {"step": 4}]
    assert "line 2" in caplog.text and "line 3" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_null_since_json_has_no_other(tmp_path, value):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append({"step": 1, "loss": 2.5, "grad_norm": value})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "grad_norm": null}\n'
    assert History.load(path) == [{"step": 1, "loss": 2.5, "grad_norm": None}]


def test_truncate_mends_what_an_earlier_version_wrote(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "grad_norm": Infinity}\n{"step": 2}\n')
    History(path).truncate(1)
    assert path.read_text() == '{"step": 1, "grad_norm": null}\n'
