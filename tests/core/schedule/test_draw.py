"""What can be read off a picture of a schedule."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from mpsdk.errors import ScheduleError
from mpsdk.schedule import Costs, draw, generate, simulate


def texts(path) -> list[str]:
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def drawn(tmp_path, *arguments, **options) -> list[str]:
    draw(simulate(generate(*arguments), Costs(1, 2)), tmp_path / "schedule.svg", **options)
    return texts(tmp_path / "schedule.svg")


def test_svg_says_schedule_sizes_bubble_ranks_and_microbatches(tmp_path):
    words = drawn(tmp_path, "1f1b", 4, 8)
    assert "1f1b: 4 ranks, 8 microbatches, bubble 27.3 %" in words
    assert [f"rank {rank}" in words for rank in range(4)] == [True] * 4
    assert words.count("7") == 8  # a forward and a backward on each rank
    assert {"forward", "backward", "idle"} < set(words)
    assert not {"backward, input", "darker: a later stage of the rank"} & set(words)


def test_split_backwards_and_virtual_stages_have_their_own_look(tmp_path):
    words = drawn(tmp_path, "zb-v", 2, 4, 2)
    assert {"forward", "backward, input", "backward, weights", "darker: a later stage of the rank"} < set(
        words
    )
    assert "backward" not in words
    assert any(word.startswith("zb-v: 2 ranks, 2 stages a rank, 4 microbatches") for word in words)


def test_numbers_are_left_out_where_they_do_not_fit(tmp_path):
    assert "99" not in drawn(tmp_path, "1f1b", 2, 100)
    assert "99" in drawn(tmp_path, "1f1b", 2, 100, width=60)


def test_the_same_timeline_gives_the_same_svg(tmp_path):
    for name in ("one.svg", "two.svg"):
        draw(simulate(generate("interleaved", 2, 4, 2)), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_png_grows_with_the_ranks_but_stays_a_page(tmp_path):
    heights = []
    for ranks in (2, 8, 48):
        draw(simulate(generate("gpipe", ranks, 4)), tmp_path / "schedule.png")
        data = (tmp_path / "schedule.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        heights.append(int.from_bytes(data[20:24]))
    assert heights[0] < heights[1] < heights[2] < 3000


def test_one_rank_and_no_time_can_be_drawn(tmp_path):
    draw(simulate(generate("gpipe", 1, 1), Costs(0, 0)), tmp_path / "schedule.svg")
    assert "gpipe: 1 rank, 1 microbatch, bubble 0.0 %" in texts(tmp_path / "schedule.svg")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match=r"schedule\.pdf: a schedule is drawn as \.svg or \.png"):
        draw(simulate(generate("gpipe", 1, 1)), tmp_path / "schedule.pdf")


def test_matplotlib_is_imported_only_to_draw():
    program = "import sys, mpsdk.schedule; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
