"""Draws the pictures of docs/schedules.md into docs/pictures: python docs/make_pictures.py"""

from __future__ import annotations

from pathlib import Path

from mpsdk.schedule import Costs, draw, generate, simulate

PICTURES = Path(__file__).parent / "pictures"
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}  # and how many stages a rank has


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, stages in SCHEDULES.items():
        costs = Costs(
            forward=1 / stages, backward=2 / stages, backward_input=1 / stages, backward_weight=1 / stages
        )
        draw(simulate(generate(name, 4, 8, stages), costs), PICTURES / f"schedule-{name}.svg")


if __name__ == "__main__":
    main()
