"""What loading a Hugging Face directory takes: a model large enough to tell, and a look at a process's own memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mpsdk.description import ModelDescription
from mpsdk.families import family_of, read_model
from mpsdk.families.layout import hf_tensors
from mpsdk.families.source import HuggingFaceSource
from mpsdk.plan import Plan
from tests.cases import make_plan

CONFIG: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
LAYOUT: dict[str, Any] = {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}
SHARDS = 5
SLACK = 4 << 20  # bytes: threads, caches of allocators, pages that are not full


def loading_plan(framework: str, **changes: int) -> Plan:
    """Of weights alone: the optimizer has no state."""
    return make_plan(
        "llama", 4, LAYOUT, framework=framework, model=CONFIG | changes, optimizer="sgd", momentum=0.0
    )


def write_shards(directory: Path, plan: Plan) -> None:
    """The plan's model as transformers would write it, in `SHARDS` files, without ever being whole in memory."""
    directory.mkdir(exist_ok=True)
    spec = plan.description.spec
    assert spec is not None
    config = family_of("llama").hf_config(spec)
    tensors = list(hf_tensors(family_of("llama").rules("causal-lm"), plan.description))
    rng, weight_map = np.random.default_rng(0), dict[str, str]()
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {
            tensor.name: rng.standard_normal(tensor.shape, np.float32) for tensor in tensors[shard::SHARDS]
        }
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def open_source(directory: str | Path) -> HuggingFaceSource:
    model = read_model(directory)
    return HuggingFaceSource(directory, model.family, model.spec)


def bound(plan: Plan, stage: int, tp: int) -> int:
    """Bytes of a rank's part and of the largest tensor."""
    part = sum(4 * int(np.prod(held.shape)) for held in plan.stage_tensors(stage, tp))
    return part + 4 * max(tensor.elements for tensor in plan.description.tensors())


def whole(description: ModelDescription) -> int:
    """Bytes of all weights."""
    return 4 * description.parameters


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Bytes that this process has of its own (files that are mapped left out) at most more than at the beginning, looked at
    all the time by a thread (Linux)."""
    found, done = [0], threading.Event()
    start = _anonymous()

    def look() -> None:
        while not done.is_set():
            found[0] = max(found[0], _anonymous() - start)
            time.sleep(0.0005)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = max(found[0], _anonymous() - start)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what memory a process has of its own")
