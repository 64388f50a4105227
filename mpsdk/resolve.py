"""resolve: intent and model in, Plan out. Refuses everything that can be known to be wrong, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator

from mpsdk.backend import limits_of
from mpsdk.config import Distribution, Training
from mpsdk.cost import partition_costs
from mpsdk.description import ModelDescription
from mpsdk.errors import ConfigError, Problem
from mpsdk.families.spec import Dropout
from mpsdk.partition import partition_blocks
from mpsdk.plan import Plan, training_schedule
from mpsdk.topology import DEFAULT_PLACEMENT, Degrees, Topology

VOCABULARY_MULTIPLE = 8  # rows a tensor-parallel rank: keeps bf16 rows of the logits at 16-byte boundaries
MICROBATCHES_PER_STAGE = 4  # a bubble of at most (p-1)/(4p+p-1), a fifth of a step


def resolve(
    distribution: Distribution,
    description: ModelDescription,
    training: Training,
    *,
    world_size: int,
    framework: str,
) -> Plan:
    """The plan for `world_size` ranks. Raises ConfigError listing every problem."""
    problems: list[Problem] = []
    dp = _data_parallel(distribution, world_size, problems)
    problems += _model_problems(distribution, description, training)
    problems += _framework_problems(distribution, description, training, framework)
    if distribution.checkpoint.asynchronous:  # the loop, which is every framework's, has no such writer
        remedy = "checkpoints are written synchronously so far; set it to false"
        problems.append(Problem("checkpoint.asynchronous", True, remedy))

    pipeline = distribution.pipeline
    data_size = dp * distribution.sharded_data_parallel.degree
    rows = _rows(training, data_size, problems)
    microbatches = pipeline.microbatches or _default_microbatches(pipeline.degree, rows)
    problems += _microbatch_problems(distribution, rows, microbatches)
    if problems:
        raise ConfigError(problems, where=f"the plan for {world_size} ranks")

    degrees = Degrees(
        pp=pipeline.degree,
        dp=dp,
        sdp=distribution.sharded_data_parallel.degree,
        cp=1,
        tp=distribution.tensor_parallel.degree,
    )
    schedule = training_schedule(pipeline, microbatches)
    return Plan(
        framework=framework,
        world_size=world_size,
        degrees=degrees,
        placement=Topology(degrees, distribution.placement or DEFAULT_PLACEMENT).placement,
        microbatches=microbatches,
        microbatch_size=rows // microbatches,
        stages=_stages(distribution, description, training),
        schedule_hash=schedule.hash,
        padded_vocab_size=_padded_vocabulary(description, degrees.tp),
        distribution=_as_done(distribution, description),
        training=training,
        description=_with_dropout(description, training.dropout),
    )


def _as_done(distribution: Distribution, description: ModelDescription) -> Distribution:
    """A model that makes its own layers has the whole sequence on every rank."""
    if description.factory is None or not distribution.tensor_parallel.sequence_parallel:
        return distribution
    section = distribution.tensor_parallel.model_copy(update={"sequence_parallel": False})
    return distribution.model_copy(update={"tensor_parallel": section})


def _padded_vocabulary(description: ModelDescription, tp: int) -> int:
    """Rows with padding. A model that makes its own layers makes its own vocabulary."""
    size = description.vocab_size or 0
    return size if description.factory is not None else _padded(size, VOCABULARY_MULTIPLE * tp)


def _with_dropout(description: ModelDescription, probability: float | None) -> ModelDescription:
    """`description` with one probability everywhere instead of the model's own; None leaves it."""
    if probability is None or description.spec is None:
        return description
    dropout = Dropout(embedding=probability, attention=probability, residual=probability)
    head = description.spec.head
    if head.classifies:
        head = head.model_copy(update={"dropout": probability})
    spec = description.spec.model_copy(update={"dropout": dropout, "head": head})
    return description.model_copy(update={"spec": spec})


def _data_parallel(distribution: Distribution, world_size: int, problems: list[Problem]) -> int:
    """The number of replicas. Adds a problem, and answers 1, when the degrees don't make up the world."""
    stated = {
        "pipeline.degree": distribution.pipeline.degree,
        "sharded_data_parallel.degree": distribution.sharded_data_parallel.degree,
        "tensor_parallel.degree": distribution.tensor_parallel.degree,
    }
    model = 1
    for degree in stated.values():
        model *= degree
    product = " x ".join(f"{name} {degree}" for name, degree in stated.items())
    if distribution.data_parallel == "fill":
        if world_size % model == 0:
            return world_size // model
        remedy = f"{product} = {model} does not divide the world of {world_size} ranks; use a multiple of {model} ranks"
        if world_size > model:
            remedy += f", such as {world_size // model * model}"
        problems.append(Problem("world_size", world_size, remedy + ", or degrees whose product divides it"))
        return 1
    total = model * distribution.data_parallel
    if total != world_size:
        remedy = (
            f"{product} x data_parallel {distribution.data_parallel} = {total}, which must equal the world size; "
            f'start {total} ranks, or set data_parallel: "fill"'
        )
        problems.append(Problem("world_size", world_size, remedy))
    return distribution.data_parallel


def _model_problems(
    distribution: Distribution, description: ModelDescription, training: Training
) -> Iterator[Problem]:
    """What doesn't fit between the degrees and the model's own sizes."""
    tp = distribution.tensor_parallel
    units = {
        tensor.unit: (tensor.units, tensor.role)
        for tensors in (description.embedding, *description.kinds.values(), description.head)
        for tensor in tensors
        if tensor.unit is not None and tensor.units is not None
    }
    for unit, (count, role) in units.items():
        if count % tp.degree:
            remedy = f"must divide the model's {unit} ({count}); {_listed(_divisors(count))} would do"
            if role == "part":
                remedy += ", or leave the layer whole: set_tensor_parallelism(layer, False)"
            yield Problem("tensor_parallel.degree", tp.degree, remedy)
    length = training.sequence_length
    if tp.sequence_parallel and description.factory is None and length % tp.degree:
        yield Problem(
            "training.sequence_length",
            length,
            f"sequence parallelism cuts it into tensor_parallel.degree {tp.degree} parts; use a multiple of {tp.degree}, "
            f"such as {_padded(length, tp.degree)}, or set tensor_parallel.sequence_parallel: false",
        )
    if description.max_positions is not None and length > description.max_positions:
        yield Problem(
            "training.sequence_length",
            length,
            f"the model has positions for at most {description.max_positions}",
        )
    pipeline, blocks = distribution.pipeline, len(description.blocks)
    stages = pipeline.degree * pipeline.virtual_stages
    if stages > blocks:
        yield Problem(
            "pipeline.degree",
            pipeline.degree,
            f"makes {stages} stages of a model of {blocks} blocks; a stage needs a block, so at most {blocks} stages",
        )
    if pipeline.partition != "auto" and sum(pipeline.partition) != blocks:
        yield Problem(
            "pipeline.partition",
            list(pipeline.partition),
            f"adds up to {sum(pipeline.partition)}, and the model has {blocks} blocks",
        )
    head = "causal-lm" if description.spec is None else description.spec.head.objective
    if training.objective != head:
        remedy = f"the model's head is for {head!r}; set it to that, or give the model another head"
        yield Problem("training.objective", training.objective, remedy)
    if training.dropout is not None and training.dropout > 0 and description.spec is None:
        yield Problem(
            "training.dropout", training.dropout, "can only be set for a model family; set it in the model"
        )


def _framework_problems(
    distribution: Distribution, description: ModelDescription, training: Training, framework: str
) -> list[Problem]:
    limits = limits_of(framework)
    if limits is None:
        return [Problem("framework", framework, "no backend of that name is installed")]
    return limits(distribution, training, description)


def _rows(training: Training, data_size: int, problems: list[Problem]) -> int:
    """Rows of one data rank in one accumulation step."""
    shares = data_size * training.accumulation
    if training.global_batch % shares:
        problems.append(
            Problem(
                "training.global_batch",
                training.global_batch,
                f"must be a multiple of data ranks {data_size} x accumulation {training.accumulation} = {shares}; "
                f"{_padded(training.global_batch, shares)} would do",
            )
        )
    return max(1, training.global_batch // shares)


def _default_microbatches(stages: int, rows: int) -> int:
    if stages == 1:
        return 1
    return max(count for count in _divisors(rows) if count <= MICROBATCHES_PER_STAGE * stages)


def _microbatch_problems(distribution: Distribution, rows: int, microbatches: int) -> Iterator[Problem]:
    pipeline = distribution.pipeline
    if rows % microbatches:
        yield Problem(
            "pipeline.microbatches",
            microbatches,
            f"must divide the {rows} rows that a data rank has in one accumulation step "
            f"(global_batch / data ranks / accumulation); {_listed(_divisors(rows))} would do",
        )
    if pipeline.schedule == "interleaved" and microbatches % pipeline.degree:
        yield Problem(
            "pipeline.microbatches",
            microbatches,
            f"the interleaved schedule needs a multiple of pipeline.degree {pipeline.degree}",
        )


def _stages(
    distribution: Distribution, description: ModelDescription, training: Training
) -> tuple[tuple[int, int], ...]:
    pipeline = distribution.pipeline
    counts = pipeline.partition
    if counts == "auto":
        blocks, embedding, head = partition_costs(description, training.sequence_length)
        counts = partition_blocks(
            blocks,
            pipeline.degree * pipeline.virtual_stages,
            embedding=embedding,
            head=head,
            memory_weight=pipeline.memory_weight,
        )
    stages: list[tuple[int, int]] = []
    start = 0
    for count in counts:
        stages.append((start, start + count))
        start += count
    return tuple(stages)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _listed(numbers: list[int], most: int = 8) -> str:
    text = ", ".join(str(number) for number in numbers[:most])
    return f"{text}, ..." if len(numbers) > most else text
