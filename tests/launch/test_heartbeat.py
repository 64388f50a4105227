from __future__ import annotations

import threading
import timeit

import pytest

from mpsdk.launch.heartbeat import Activity, Heartbeat, read_activity


def test_last_note_is_read_back_with_its_number(tmp_path):
    heartbeat = Heartbeat(tmp_path / "activity-0")
    assert read_activity(tmp_path / "activity-0") is None
    heartbeat.note("step 1: forward 0")
    heartbeat.note("step 1: send activation 0 to stage 1")
    activity = read_activity(tmp_path / "activity-0")
    assert activity is not None
    assert (activity.number, activity.text) == (2, "step 1: send activation 0 to stage 1")


def test_shorter_note_leaves_nothing_of_a_longer_one_and_a_long_one_is_cut(tmp_path):
    heartbeat = Heartbeat(tmp_path / "activity-0")
    for text in ("é" * 500, "short"):
        heartbeat.note(text)
        activity = read_activity(tmp_path / "activity-0")
        assert activity is not None
        assert text.startswith(activity.text) and len(activity.text) == min(116, len(text))


def test_missing_or_foreign_file_is_no_activity(tmp_path):
    assert read_activity(tmp_path / "nothing") is None
    (tmp_path / "foreign").write_text("hello")
    assert read_activity(tmp_path / "foreign") is None


def test_a_reader_never_sees_half_a_note(tmp_path):
    heartbeat = Heartbeat(tmp_path / "activity-0")
    texts = ["a" * 200, "b" * 150]
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in texts:
                heartbeat.note(text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [read_activity(tmp_path / "activity-0") for _ in range(3000)]
    finally:
        stop.set()
        writer.join()
    assert {activity.text for activity in seen if activity} <= set(texts)
    assert any(seen)


def test_a_note_costs_at_most_five_microseconds(tmp_path):
    heartbeat = Heartbeat(tmp_path / "activity-0")
    count = 20_000
    best = min(timeit.repeat(lambda: heartbeat.note("step 12: receive activation 3"), number=count, repeat=5))
    assert best / count < 5e-6


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        ("step 12: receive activation 3 from stage 0", True),
        ("wait for 'ready' from rank 1", True),
        ("evaluation 3: all_reduce loss", True),
        ("step 12: forward 3", False),
        ("write checkpoint, then wait", False),
    ],
)
def test_a_note_says_whether_the_rank_depends_on_another(text, waits):
    assert Activity(1, 0.0, text).waits is waits
