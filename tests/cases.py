"""What the tests of every framework share: small models, made-up batches, a short training, and how close it must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL, Backend, Batch, Place, TensorSource
from mpsdk.config import Distribution, Training
from mpsdk.families import FAMILIES as TABLES
from mpsdk.families import TransformerSpec, read_model
from mpsdk.families.describe import describe_spec
from mpsdk.families.spec import Objective
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan
from mpsdk.resolve import resolve

BOUND = 1e-5  # relative: losses, norms, and tensors by their largest element
GPT2 = {
    "model_type": "gpt2", "vocab_size": 101, "n_positions": 32, "n_embd": 64, "n_layer": 4, "n_head": 8,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 101, "max_position_embeddings": 32, "hidden_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 112,
    "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    # as narrow as tensor parallelism over two ranks allows, and two blocks for each of four ranks
    "gpt2-deep": GPT2 | {"n_layer": 8, "n_embd": 32, "n_head": 4},
    "llama-deep": LLAMA | {"num_hidden_layers": 8, "hidden_size": 32, "num_attention_heads": 4,
                           "num_key_value_heads": 2, "intermediate_size": 48},
}  # fmt: skip
_SMALL = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
_GROUPED = _SMALL | {"max_position_embeddings": 32, "num_key_value_heads": 2, "classifier_dropout": 0.0}
EVERY_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"n_embd": 32, "n_head": 4, "classifier_dropout": 0.0},
    "bert": {"model_type": "bert", "max_position_embeddings": 32, **_SMALL, **_NO_DROPOUT},
    "roberta": {"model_type": "roberta", "max_position_embeddings": 34, "type_vocab_size": 1, **_SMALL, **_NO_DROPOUT},
    "gptj": {"model_type": "gptj", "vocab_size": 101, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 4,
             "rotary_dim": 4},
    "gpt_neo": {"model_type": "gpt_neo", "vocab_size": 101, "max_position_embeddings": 32, "hidden_size": 32,
                "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5,
                "classifier_dropout": 0.0},
    "gpt_neox": {"model_type": "gpt_neox", "max_position_embeddings": 32, "rotary_pct": 0.5, "classifier_dropout": 0.0,
                 **_SMALL},
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **_GROUPED},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **_GROUPED},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, **_GROUPED},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, **_GROUPED},
}  # fmt: skip
"""Of every family, with what it has that others haven't: windows, part of the features turning, grouped queries, tying."""
LABELS = 3
EVERY_HEAD = [f"{name}-{head.form.objective}" for name, family in TABLES.items() for head in family.heads]
"""Every family with each of its heads, such as "bert-masked-lm"."""
SEQUENCE_LENGTH = 16
GLOBAL_BATCH = 16
Piece = tuple[
    str, tuple[int, ...], tuple[int, ...], NDArray[np.float32]
]  # slot/name, global shape, offset, values


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: by step, losses and gradient norms; pieces of first gradients and of final state."""

    losses: list[float]
    norms: list[float]
    gradients: list[Piece] = field(default_factory=list)
    state: list[Piece] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)


def spec_of(family: str, objective: Objective | None = None, **model: Any) -> TransformerSpec:
    """The spec of one of the models above, with other settings of its configuration and the head for `objective`."""
    config = (FAMILIES | EVERY_FAMILY)[family] if objective else FAMILIES[family]
    return read_model(config | model, objective=objective, labels=LABELS).spec


def make_plan(
    family: str, world_size: int, distribution: dict[str, Any], *, framework: str, **training: Any
) -> Plan:
    settings = {
        "steps": 10, "global_batch": GLOBAL_BATCH, "sequence_length": SEQUENCE_LENGTH, "accumulation": 2,
        "learning_rate": 1e-3, "max_grad_norm": 0.5, "seed": 3, **training,
    }  # fmt: skip
    spec = spec_of(family, settings.get("objective"), **settings.pop("model", {}))
    return resolve(
        Distribution.parse(distribution),
        describe_spec(spec),
        Training(**settings),
        world_size=world_size,
        framework=framework,
    )


def global_batch(
    step: int, vocab_size: int, length: int = SEQUENCE_LENGTH, rows: int = GLOBAL_BATCH
) -> Batch:
    """Rows of a made-up language in which a token mostly decides the next, so that there is something to learn.
    Some labels are ignored, unevenly over rows."""
    random = np.random.default_rng(1000 + step)
    tokens = np.empty((rows, length + 1), np.int64)
    tokens[:, 0] = random.integers(vocab_size, size=rows)
    for position in range(length):
        surprise = random.integers(vocab_size, size=rows)
        follow = (tokens[:, position] * 7 + 3) % vocab_size
        tokens[:, position + 1] = np.where(random.random(rows) < 0.2, surprise, follow)
    labels = tokens[:, 1:].astype(np.int32)
    ignored = random.random(labels.shape) < np.linspace(0, 0.6, rows)[:, None]
    labels[ignored] = IGNORED_LABEL
    return {"input_ids": tokens[:, :-1].astype(np.int32), "labels": labels}


def batch_of(plan: Plan, step: int) -> Batch:
    """`global_batch` for the plan's objective: padded left and right where it takes masks, with labels that go with it."""
    training, spec = plan.training, plan.description.spec
    vocab_size = plan.description.vocab_size or 0
    batch = dict(global_batch(step, vocab_size, training.sequence_length, training.global_batch))
    if training.objective == "causal-lm":
        return batch
    assert spec is not None
    random = np.random.default_rng(2000 + step)
    rows, length = batch["input_ids"].shape
    left, right = (random.integers(0, length // 3, size=(rows, 1)) for _ in range(2))
    if spec.head.pooled == "first":
        left[:] = 0  # else a sequence's state would be padding's
    mask = (np.arange(length) >= left) & (np.arange(length) < length - right)
    ids = np.where(batch["input_ids"] < 2, 2, batch["input_ids"])  # 0 and 1 are padding's
    batch["input_ids"] = np.where(mask, ids, spec.position_padding or 0).astype(np.int32)
    batch["attention_mask"] = mask.astype(np.int32)
    if "token_type_ids" in plan.batch_shapes:
        batch["token_type_ids"] = (random.random((rows, length)) < 0.5).astype(np.int32)
    if spec.head.classifies:
        batch["labels"] = np.where(batch["labels"] < 0, batch["labels"], batch["labels"] % LABELS)
    if training.objective == "sequence-classification":
        batch["labels"] = (ids[:, 5] % LABELS).astype(np.int32)
        return batch
    batch["labels"] = np.where(mask, batch["labels"], IGNORED_LABEL).astype(np.int32)
    return batch


def rows_of(batch: Batch, plan: Plan, rank: int) -> Batch:
    """This data rank's share, shaped (accumulation, microbatches, microbatch size, length)."""
    share = plan.training.global_batch // plan.data_size
    start = plan.topology.data_rank(rank) * share
    shape = (plan.training.accumulation, plan.microbatches, plan.microbatch_size)
    return {
        name: rows[start : start + share].reshape(*shape, *rows.shape[1:]) for name, rows in batch.items()
    }


def train(
    backend: Backend,
    place: Place,
    plan: Plan,
    steps: int,
    *,
    source: TensorSource | None = None,
    start: int = 0,
    prepare: Callable[[Outcome], None] = lambda outcome: None,
    after_first: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """`steps` optimizer steps of `backend` from `source`, or from the plan's own initial weights.

    `prepare` is called with the outcome once the backend is filled, `after_first` after the first step: either may add the
    first update's gradients.
    """
    try:
        backend.build(plan, place)
        backend.load(source or RandomSource(plan.description, plan.training.seed))
        outcome = Outcome([], [])
        prepare(outcome)
        for step in range(start, start + steps):
            batch = rows_of(batch_of(plan, step), plan, place.rank)
            rate = plan.training.learning_rate_at(step)
            values = backend.step(batch, step=step, learning_rate=rate).read()
            outcome.losses.append(values["loss"])
            outcome.norms.append(values["grad_norm"])
            if step == start:
                after_first(outcome)
        state = backend.shards()
        for shard in state.shards:
            outcome.state.append(
                (f"{shard.slot}/{shard.name}", shard.global_shape, shard.offset, shard.read())
            )
        outcome.scalars.update(state.scalars)
        return outcome
    finally:
        backend.close()


def evaluate_then_train(
    backend: Backend, place: Place, plan: Plan, steps: int
) -> tuple[list[float], list[float]]:
    """For each step the batch's loss evaluated before the step, and the loss that the step saw."""
    evaluated, trained = [], []
    try:
        backend.build(plan, place)
        backend.load(RandomSource(plan.description, plan.training.seed))
        for step in range(steps):
            batch = rows_of(batch_of(plan, step), plan, place.rank)
            found = backend.evaluate(batch, step=step)
            evaluated.append(found.loss / found.count)
            trained.append(backend.step(batch, step=step, learning_rate=1e-2).read()["loss"])
        return evaluated, trained
    finally:
        backend.close()


def assemble(pieces: list[Piece]) -> dict[str, NDArray[np.float32]]:
    """Whole tensors from the pieces of all ranks; every element must come from exactly one."""
    whole: dict[str, NDArray[np.float32]] = {}
    written: dict[str, NDArray[np.int8]] = {}
    for name, shape, offset, values in pieces:
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        whole.setdefault(name, np.zeros(shape, np.float32))[place] = values
        written.setdefault(name, np.zeros(shape, np.int8))[place] += 1
    for name, counts in written.items():
        assert (counts == 1).all(), f"{name}: elements written {counts.min()} to {counts.max()} times"
    return whole


def assert_close(
    actual: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], floor: float = 0.0
) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        difference = np.abs(actual[name] - wanted).max()
        assert difference <= BOUND * np.abs(wanted).max() + floor, f"{name}: off by {difference}"


def assert_parity(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, expected[0].losses, rtol=BOUND)
        np.testing.assert_allclose(outcome.norms, expected[0].norms, rtol=BOUND)
    gradients, wanted = (assemble([p for o in some for p in o.gradients]) for some in (outcomes, expected))
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    assert_close(gradients, wanted, floor=1e-9 * largest)


def assert_same_weights(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    gradients = assemble([piece for outcome in expected for piece in outcome.gradients])
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    state, wanted = (assemble([p for o in some for p in o.state]) for some in (outcomes, expected))
    assert_close(state, wanted, floor=1e-9 * largest)


class MemorySource:
    """A TensorSource over whole tensors, named slot/name."""

    def __init__(self, tensors: dict[str, NDArray[np.float32]], scalars: dict[str, float]) -> None:
        self.tensors, self.scalars = tensors, scalars
        self.slots = frozenset(name.split("/")[0] for name in tensors)

    def read(
        self, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return self.tensors[f"{slot}/{name}"][place]
