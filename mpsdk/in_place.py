"""Working as a rank where a launcher such as torchrun has started the processes already: nothing is spawned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

from mpsdk.backend import Place
from mpsdk.launch.control import Control, control_directory
from mpsdk.launch.environment import generation_from_environment
from mpsdk.work_order import WorkOrder
from mpsdk.worker import Emit, Work

_calls = itertools.count()  # every rank makes the same calls in the same order, so this numbers them alike


def work_in_place(place: Place, output_dir: str, make: Callable[[], WorkOrder], emit: Emit) -> Work:
    """Do this rank's share of the order that rank 0 makes, and give the work back when it is done.

    Only rank 0 resolves, reads the data and prepares it; what is wrong with them is raised on every rank. `emit` is
    told the events on rank 0.
    """
    number = next(_calls)
    generation = f"{generation_from_environment()}-{number}"
    shared = control_directory(output_dir, generation)
    place = replace(place, folder=str(shared))
    if number:
        # The launcher's rendezvous still has the addresses of the call before. The output directory is shared anyway.
        place = replace(place, store=str(shared / "store"))
    control = Control(output_dir, generation, place.rank, place.world_size, place.timeout, place.note)
    plain = control.decide("order", lambda: make().model_dump(mode="json"))
    order = WorkOrder.model_validate_json(json.dumps(plain))
    work = Work(order, place, control, generation, emit)
    work.run()
    return work
