"""Pipeline schedules as data: made by `generate`, proved by `validate`, timed by `simulate`, drawn."""

from mpsdk.schedule.actions import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from mpsdk.schedule.communication import add_communication
from mpsdk.schedule.generators import FORWARD_ONLY, GENERATORS, forward_only, generate

__all__ = [
    "COMPUTE",
    "FORWARD_ONLY",
    "GENERATORS",
    "RECEIVES",
    "SENDS",
    "Action",
    "Kind",
    "Schedule",
    "add_communication",
    "forward_only",
    "generate",
]
