"""What `compile: true` has XLA compile: seen in what XLA itself writes down, since TensorFlow may leave it out silently."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mpsdk.config import Distribution, Training
from mpsdk.errors import BackendError
from mpsdk.families import read_model
from mpsdk.families.describe import describe_spec
from mpsdk_tf import compiled
from mpsdk_tf.limits import limits
from tests.cases import FAMILIES

SCRIPT = """
import sys, tests.tf.conftest
from tests.tf import ranks
from tests.tf.cases import make_plan, train_only
world_size, distribution = int(sys.argv[1]), eval(sys.argv[2])
outcomes = ranks.run(world_size, train_only, make_plan("gpt2", world_size, distribution), 2)
assert all(loss > 0 for outcome in outcomes for loss in outcome.losses)
"""
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    # the functions that XLA has a program of; a rank of several has its own of each
    "single": (1, {}, {"probe": 1, "_train": 1}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 2}}, {"probe": 2, "forward": 4, "backward": 4}),
    "pp2-zb-h1": (
        2,
        {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-h1"}},
        {"probe": 2, "forward": 4, "backward": 4, "weights": 3},
    ),
    "tp2": (2, {"tensor_parallel": 2}, {"probe": 2, "partial": 8, "call": 8}),
}


def programs_of_xla(folder: Path) -> Counter[str]:
    """How many programs XLA made of each function, by the function's name in our source; of its gradient too."""
    names = [path.name.split(".")[1] for path in folder.glob("module_*.before_optimizations.txt")]
    inside = (re.match(r"a_(?:inference_(?:__backward_)?|forward_)(\w+?)_\d+_", name) for name in names)
    return Counter(found.group(1) for found in inside if found)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long if name == "pp2" else ()) for name in LAYOUTS]
)
def test_xla_compiles_what_it_is_asked_to(layout: str, tmp_path: Path) -> None:
    world_size, distribution, expected = LAYOUTS[layout]
    command = [sys.executable, "-c", SCRIPT, str(world_size), repr(distribution | {"compile": True})]
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    subprocess.run(command, check=True, env=environment, timeout=240)
    assert programs_of_xla(tmp_path) == expected


def test_a_machine_without_xla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*args: object, **kwargs: object) -> Any:
        def call(*args: object) -> None:
            return None

        def no_program(*args: object) -> Any:
            return lambda stage: ""

        call.experimental_get_compiler_ir = no_program  # type: ignore[attr-defined]
        return lambda function: call

    monkeypatch.setattr(compiled.tf, "function", without)
    with pytest.raises(BackendError, match="XLA gave no program"):
        compiled.verify_compiler("/device:CPU:0")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"compile": "auto"}, "compile"),
        (
            {"compile": True, "tensor_parallel": 2, "activation_checkpointing": "selective"},
            "activation_checkpointing.mode",
        ),
    ],
)
def test_what_cant_be_compiled_is_refused(request_: dict[str, Any], field: str) -> None:
    description = describe_spec(read_model(FAMILIES["gpt2"]).spec)
    training = Training(steps=1, global_batch=2, sequence_length=16)
    problems = limits(Distribution.parse(request_), training, description)
    assert [problem.field for problem in problems] == [field]
