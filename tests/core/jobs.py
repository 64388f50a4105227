"""Small jobs for the fake backend, and ways to run them without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpsdk.backend import Place
from mpsdk.config import Distribution, Training
from mpsdk.data import BytesTokenizer, prepare
from mpsdk.families.describe import describe_spec
from mpsdk.families.read import read_model
from mpsdk.launch.control import Control
from mpsdk.launch.environment import new_generation
from mpsdk.resolve import resolve
from mpsdk.work_order import PreparedData, WorkOrder
from mpsdk.worker import Work

MODEL: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
}
TEXT = "".join(f"{number} green bottles hanging on the wall. " for number in range(60))
TRAINING: dict[str, Any] = {
    "steps": 8,
    "global_batch": 4,
    "sequence_length": 16,
    "learning_rate": 1e-2,
    "tokenizer": "bytes",
    "log_every": 2,
}


def order_in(
    directory: Path,
    *,
    world_size: int = 1,
    resume: str = "auto",
    distribution: dict[str, Any] | None = None,
    validation: float | None = None,
    **training: Any,
) -> WorkOrder:
    """An order to train the small model on `TEXT`, in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    plan = resolve(
        Distribution.parse(distribution or {}),
        describe_spec(read_model(MODEL).spec),
        Training.parse({**TRAINING, **training}),
        world_size=world_size,
        framework="fake",
    )
    dataset = prepare(
        str(text),
        tokenizer=BytesTokenizer(),
        sequence_length=plan.training.sequence_length,
        cache_directory=directory / "data",
    )
    train = PreparedData(directory=str(dataset.path), validation_fraction=validation or 0.0)
    return WorkOrder(
        mode="train",
        plan=plan,
        output_dir=str(directory),
        resume=resume,
        train=train,
        validation=train.model_copy(update={"part": "validation"}) if validation else None,
    )


def work(
    order: WorkOrder,
    *,
    answers: dict[int, str] | None = None,
    generation: str | None = None,
    note: Callable[[str], None] = lambda activity: None,
) -> list[dict[str, Any]]:
    """Do the order in this process, its ranks as threads if there are several, and give back the events.

    `answers`: what to answer to the log event of a step. `note`: told what rank 0 is about to do.
    """
    generation = generation or new_generation()
    events: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def emit(event: dict[str, Any]) -> object:
        events.append(event)
        return (answers or {}).get(event["step"]) if event["event"] == "log" else None

    def do(rank: int) -> None:
        world_size = order.plan.world_size
        store = str(Path(order.output_dir, f"store-{generation}"))
        told = note if rank == 0 else lambda activity: None
        here = Place(rank, world_size, store=store, timeout=20, note=told)
        control = Control(order.output_dir, generation, rank, world_size, timeout=20)
        try:
            Work(order, here, control, generation, emit).run()
        except Exception as error:
            failures.append(error)

    if order.plan.world_size == 1:
        do(0)
    else:
        threads = [threading.Thread(target=do, args=(rank,)) for rank in range(order.plan.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return events
