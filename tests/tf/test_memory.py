"""Peak memory, measured: each training in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def peak(schedule: str, microbatches: int) -> int:
    command = [sys.executable, "-m", "tests.tf.peak_memory", schedule, str(microbatches)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


def test_memory_of_1f1b_does_not_grow_with_the_microbatches_as_that_of_gpipe_does() -> None:
    few, many, gpipe = peak("1f1b", 4), peak("1f1b", 16), peak("gpipe", 16)
    assert gpipe > 1.5 * few, "activations must matter"
    assert many - few < 0.2 * (gpipe - few)
