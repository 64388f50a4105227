"""Pipeline schedules as data: made by `generate`, proved by `validate`, timed by `simulate`, drawn by `draw`."""

from mpsdk.schedule.actions import COMPUTE, FORWARD_ONLY, RECEIVES, SENDS, Action, Kind, Schedule
from mpsdk.schedule.communication import add_communication
from mpsdk.schedule.draw import draw
from mpsdk.schedule.generators import GENERATORS, generate
from mpsdk.schedule.simulate import Costs, Span, Timeline, peak_in_flight, simulate, stage_in_flight
from mpsdk.schedule.validate import validate

__all__ = [
    "COMPUTE",
    "FORWARD_ONLY",
    "GENERATORS",
    "RECEIVES",
    "SENDS",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "Span",
    "Timeline",
    "add_communication",
    "draw",
    "generate",
    "peak_in_flight",
    "simulate",
    "stage_in_flight",
    "validate",
]
