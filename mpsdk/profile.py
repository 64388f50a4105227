"""What a profiled step leaves on disk: of each rank a trace and measured spans, and the plan that they belong to.

<output_dir>/profile/step-00000003/
    plan.json
    rank-00000.pt.trace.json         every operation, for Perfetto and TensorBoard; .gz behind it where it is large
    rank-00000.spans.json            when each action of the schedule ran: `RankSpans`
    timeline.png, timeline.svg       what ran and what the simulator says, drawn when the run has ended
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mpsdk.errors import DataError

FOLDER = "profile"
PLAN_FILE = "plan.json"
PICTURE = "timeline.png"
LARGE = 32 << 20  # bytes of a trace above which it is compressed

WAIT = "wait"  # for the message that the action after it uses
TOKEN_COUNT = "token count"
SENDS = "sends"  # waiting, at the end of a pass, until everything sent has gone
REDUCTION = "gradient reduction"  # waiting, at the end of the last pass, for gradients of other data ranks
UPDATE = "update"
PROGRAM = "program"  # all of a step, where it is compiled as one and nothing in it can be told apart

_SPANS = re.compile(r"rank-(\d{5,9})\.spans\.json")
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


class MeasuredSpan(BaseModel):
    """What a rank did from `start` to `end`, in seconds of its machine's clock.

    `kind` is that of an action (`F`, `B`, `SF`, ...), `wait`, or a phase of the step that belongs to no stage: `token count`,
    `sends`, `gradient reduction`, `update`; `program` is all of a step that has no parts. The span of an action begins when its
    wait is over: the two don't overlap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    stage: int | None = None
    microbatch: int | None = None
    part: int = 0  # which of the `accumulation` equal parts of the batch
    start: float
    end: float


class RankSpans(BaseModel):
    """The spans of one rank in one step, in the order in which they ended.

    Times are seconds of a clock that all ranks of one `machine` share (CLOCK_MONOTONIC). Those of several machines come
    together at `met`, the moment at which this rank left the barrier before the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    rank: int
    machine: str
    met: float
    spans: tuple[MeasuredSpan, ...]

    def save(self, directory: Path) -> Path:
        """Write the file whole or not at all."""
        target = spans_path(directory, self.rank)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        os.replace(partial, target)
        return target

    @classmethod
    def load(cls, path: Path) -> RankSpans:
        """Raises DataError when the file is missing or was written by another version."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path} can't be read: {error}") from error
        except ValidationError as error:
            raise DataError(f"{path} holds no spans of this version of mpsdk: {error}") from None


def step_folder(output_dir: str | os.PathLike[str], step: int) -> Path:
    """Where step `step`, counted from 1, leaves what was measured."""
    return Path(output_dir, FOLDER, f"step-{step:08d}")


def step_folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Of every step that was profiled, in order."""
    return sorted(folder for folder in Path(output_dir, FOLDER).glob("step-*") if measured_ranks(folder))


def trace_path(directory: Path, rank: int) -> Path:
    """TensorBoard knows a trace by the end of its name, and calls a worker what stands before."""
    return directory / f"rank-{rank:05d}.pt.trace.json"


def spans_path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.spans.json"


def measured_ranks(directory: Path) -> list[int]:
    """The ranks whose spans are in `directory`."""
    found = (_SPANS.fullmatch(path.name) for path in directory.glob("rank-*.spans.json"))
    return sorted(int(match[1]) for match in found if match)


def is_measured(directory: Path, ranks: Sequence[int]) -> bool:
    """Whether all of `ranks` have left their spans in `directory`."""
    return set(ranks) <= set(measured_ranks(directory))


def compress_if_large(trace: Path) -> Path:
    """Put a trace above `LARGE` bytes into a .gz, which Perfetto and TensorBoard open too. Gives its path."""
    if trace.stat().st_size <= LARGE:
        return trace
    compressed = trace.with_name(f"{trace.name}.gz")
    with trace.open("rb") as source, gzip.open(compressed, "wb", compresslevel=5) as target:
        shutil.copyfileobj(source, target)
    trace.unlink()
    return compressed


def machine() -> str:
    """A name of this machine since it was started: ranks with the same one share a clock."""
    try:
        return _MACHINE.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()
