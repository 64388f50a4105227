"""Distribution: how a model is to be spread over ranks, as the user asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from mpsdk.config.base import Section, rule
from mpsdk.config.document import Document
from mpsdk.config.fields import Count, Fraction, ListAsTuple, Natural, PathText, Positive
from mpsdk.config.wording import Accepts
from mpsdk.errors import Problem

_AXES = ("pp", "dp", "sdp", "cp", "tp")
_AXIS = "|".join(_AXES)


def _every_axis_once(placement: str) -> str:
    if sorted(placement.split(",")) != sorted(_AXES):
        raise ValueError
    return placement


Placement = Annotated[
    str,
    AfterValidator(_every_axis_once),
    WithJsonSchema({"type": "string", "pattern": rf"^(?!.*\b(\w+)\b.*\b\1\b)({_AXIS})(,({_AXIS})){{4}}$"}),
    Accepts(f'a permutation of "{",".join(_AXES)}"'),
]

# The fewest and the most stages a rank may have under each schedule; None: any number.
_VIRTUAL_STAGES = {"gpipe": (1, 1), "1f1b": (1, 1), "zb-h1": (1, 1), "zb-v": (2, 2), "interleaved": (2, None)}


class ShardedDataParallel(Section):
    """Data parallelism whose ranks each hold a share of the training state instead of a copy."""

    shorthand: ClassVar[str | None] = "degree"

    degree: Count = Field(default=1, description="Ranks that share one copy of the training state. 1: off.")
    level: Literal["parameters", "gradients", "optimizer"] = Field(
        default="parameters",
        description='What is shared out: "optimizer" its moments; "gradients" those and the gradients; '
        '"parameters" those and the parameters, which are whole one block at a time.',
    )
    prefetch: Natural = Field(
        default=1, description="Blocks whose parameters are gathered ahead of their use. 0: none."
    )

    @rule("level", "prefetch")
    def nothing_to_prefetch(self) -> Iterator[Problem]:
        """At level "optimizer" parameters are never gathered, so `prefetch` above 1 has no meaning."""
        if self.level == "optimizer" and self.prefetch > 1:
            remedy = 'level "optimizer" gathers no parameters; leave prefetch out, or choose another level'
            yield Problem("prefetch", self.prefetch, remedy)


class TensorParallel(Section):
    """Every large matrix multiplication cut over ranks."""

    shorthand: ClassVar[str | None] = "degree"

    degree: Count = Field(default=1, description="Ranks that one matrix multiplication is cut over. 1: off.")
    sequence_parallel: bool = Field(
        default=True,
        description="Whether norms, dropout and residuals are cut along the sequence, not repeated.",
    )


class Pipeline(Section):
    """Blocks cut into stages, microbatches passed from stage to stage."""

    shorthand: ClassVar[str | None] = "degree"

    degree: Count = Field(default=1, description="Ranks that the blocks are cut over. 1: off.")
    microbatches: Count | None = Field(
        default=None,
        description="Pieces in which a data rank's batch passes the stages. None: the plan chooses.",
    )
    virtual_stages: Count = Field(
        default=1, description='Stages a rank: 1, 2 for "zb-v", 2 or more for "interleaved".'
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = Field(
        default="1f1b", description="Order of forward and backward passes of microbatches on each rank."
    )
    partition: Annotated[Literal["auto"] | tuple[Count, ...], ListAsTuple] = Field(
        default="auto",
        description='Number of blocks of each stage, first to last. "auto": balanced by cost.',
    )
    memory_weight: Fraction = Field(
        default=0.5,
        description="What an automatic partition balances: 0 compute, 1 memory, between them a mix.",
    )

    @rule("degree", "virtual_stages", "partition")
    def partition_names_every_stage(self) -> Iterator[Problem]:
        """`partition` has one number for each of the degree · virtual_stages stages."""
        stages = self.degree * self.virtual_stages
        if self.partition != "auto" and len(self.partition) != stages:
            remedy = (
                f"has length {len(self.partition)}, but degree {self.degree} times virtual_stages "
                f'{self.virtual_stages} makes {stages} stages; give {stages} numbers of blocks, or "auto"'
            )
            yield Problem("partition", self.partition, remedy)

    @rule("partition", "memory_weight")
    def weight_needs_automatic_partition(self) -> Iterator[Problem]:
        """`memory_weight` other than its default asks for partition "auto"."""
        if self.partition != "auto" and self.changed("memory_weight"):
            remedy = 'has no effect on a partition given in numbers; leave it out, or set partition to "auto"'
            yield Problem("memory_weight", self.memory_weight, remedy)

    @rule("schedule", "virtual_stages")
    def schedule_fits_virtual_stages(self) -> Iterator[Problem]:
        """Schedules "gpipe", "1f1b", "zb-h1" have virtual_stages 1, "zb-v" 2, "interleaved" 2 or more."""
        fewest, most = _VIRTUAL_STAGES[self.schedule]
        if self.virtual_stages < fewest or (most is not None and self.virtual_stages > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            remedy = f'schedule "{self.schedule}" asks for {wanted}; set that, or choose another schedule'
            yield Problem("virtual_stages", self.virtual_stages, remedy)

    @rule("schedule", "degree")
    def schedule_needs_ranks(self) -> Iterator[Problem]:
        """Schedules "interleaved", "zb-h1" and "zb-v" ask for degree 2 or more."""
        if self.degree == 1 and self.schedule not in ("gpipe", "1f1b"):
            remedy = f'schedule "{self.schedule}" asks for 2 or more; raise degree, or leave schedule out'
            yield Problem("degree", self.degree, remedy)

    @rule("schedule", "degree", "microbatches")
    def interleaved_works_in_rounds(self) -> Iterator[Problem]:
        """Schedule "interleaved" asks for microbatches divisible by degree."""
        if self.schedule == "interleaved" and self.microbatches and self.microbatches % self.degree:
            below = self.microbatches - self.microbatches % self.degree
            choices = " or ".join(str(count) for count in (below, below + self.degree) if count)
            remedy = f'schedule "interleaved" asks for a multiple of degree {self.degree}; set {choices}'
            yield Problem("microbatches", self.microbatches, remedy)


class ActivationCheckpointing(Section):
    """Activations computed again in the backward pass instead of kept from the forward pass."""

    shorthand: ClassVar[str | None] = "mode"

    mode: Literal["none", "selective", "full"] = Field(
        default="none",
        description='"none" keeps all activations; "selective" the results of the operations in `keep`; '
        '"full" only the input of each block.',
    )
    keep: Annotated[tuple[Literal["attention", "matmul"], ...], ListAsTuple] = Field(
        default=("attention",),
        description='With mode "selective": operations whose results are kept; the rest is computed again.',
    )
    offload: bool = Field(
        default=False, description='With mode "full": whether inputs of blocks wait in CPU memory.'
    )

    @rule("mode", "keep")
    def keep_is_selective(self) -> Iterator[Problem]:
        """`keep`, unless default, asks for mode "selective"; it names at least one operation, each once."""
        if self.mode != "selective" and self.changed("keep"):
            remedy = f'has no effect with mode "{self.mode}"; leave it out, or set mode to "selective"'
            yield Problem("keep", self.keep, remedy)
        elif not self.keep:
            yield Problem("keep", self.keep, 'must name an operation; to keep none, set mode to "full"')
        elif len(set(self.keep)) != len(self.keep):
            yield Problem("keep", self.keep, "names an operation twice; name each once")

    @rule("mode", "offload")
    def offload_is_full(self) -> Iterator[Problem]:
        """`offload` asks for mode "full"."""
        if self.offload and self.mode != "full":
            remedy = f'has no effect with mode "{self.mode}"; leave it out, or set mode to "full"'
            yield Problem("offload", self.offload, remedy)


class Precision(Section):
    """Number format of forward and backward passes. Weights and optimizer state are fp32 in every mode."""

    shorthand: ClassVar[str | None] = "mode"

    mode: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description='Number format of computation. "fp16" scales the loss.'
    )
    initial_loss_scale: Positive = Field(
        default=65536.0, description='With mode "fp16": factor on the loss at the first step.'
    )
    loss_scale_growth_interval: Count = Field(
        default=2000, description='With mode "fp16": steps without overflow after which the factor doubles.'
    )

    @rule("mode", "initial_loss_scale", "loss_scale_growth_interval")
    def only_fp16_scales(self) -> Iterator[Problem]:
        """`initial_loss_scale` and `loss_scale_growth_interval`, unless default, ask for mode "fp16"."""
        for name in ("initial_loss_scale", "loss_scale_growth_interval"):
            if self.mode != "fp16" and self.changed(name):
                remedy = f'has no effect with mode "{self.mode}"; leave it out, or set mode to "fp16"'
                yield Problem(name, getattr(self, name), remedy)


class Compile(Section):
    """Compilation by the framework's own compiler."""

    shorthand: ClassVar[str | None] = "enabled"

    enabled: bool | Literal["auto"] = Field(
        default=False, description='Whether to compile. "auto": when it is measured to pay.'
    )


class Checkpoint(Section):
    """When the training state is written to disk, and how much of it stays there."""

    shorthand: ClassVar[str | None] = "every"

    every: Count | None = Field(
        default=None, description="Steps between checkpoints. None: no periodic checkpoints."
    )
    keep: Count | None = Field(default=3, description="Newest checkpoints that are kept. None: all.")
    asynchronous: bool = Field(
        default=False, description="Whether training goes on while a checkpoint is written."
    )
    directory: PathText | None = Field(
        default=None, description="Where checkpoints go. None: `checkpoints` in the job's output directory."
    )


_SAGEMAKER = (
    "is SageMaker's, whose configurations this version does not read; "
    "write pipeline, tensor_parallel, sharded_data_parallel, ... instead"
)


class Distribution(Document):
    """How a model is to be spread over ranks, checked and complete, without a model or a device in sight.

    Each section may be given in short, or as a mapping; the attributes are always sections.

    >>> Distribution(tensor_parallel=2, pipeline={"degree": 2, "microbatches": 8}).stated_degree
    4

    Raises pydantic's ValidationError; `Distribution.parse` says the same as one ConfigError.
    """

    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("smdistributed", "torch_distributed", "mpi"), _SAGEMAKER
    )

    sharded_data_parallel: ShardedDataParallel = Field(
        default=ShardedDataParallel(),
        description="Data parallelism that shares out the training state (mesh axis `sdp`).",
    )
    tensor_parallel: TensorParallel = Field(
        default=TensorParallel(), description="Matrix multiplications cut over ranks (mesh axis `tp`)."
    )
    pipeline: Pipeline = Field(default=Pipeline(), description="Blocks cut into stages (mesh axis `pp`).")
    data_parallel: Count | Literal["fill"] = Field(
        default="fill",
        description='Replicas of the whole (mesh axis `dp`). "fill": as many as the world size has room for.',
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        default=ActivationCheckpointing(), description="Activations computed again instead of kept."
    )
    precision: Precision = Field(default=Precision(), description="Number format of computation.")
    compile: Compile = Field(default=Compile(), description="Compilation by the framework's compiler.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="Training state written to disk.")
    placement: Placement | None = Field(
        default=None,
        description=f'Order of the mesh axes over ranks, right-most fastest. None: "{",".join(_AXES)}".',
    )

    @property
    def stated_degree(self) -> int:
        """The product of the stated degrees, the smallest world size that would do. "fill" counts as 1."""
        replicas = 1 if self.data_parallel == "fill" else self.data_parallel
        return math.prod(
            (self.pipeline.degree, replicas, self.sharded_data_parallel.degree, self.tensor_parallel.degree)
        )

    if TYPE_CHECKING:  # what may be given, for type checkers and editors; the fields say what it becomes

        def __init__(
            self,
            *,
            sharded_data_parallel: ShardedDataParallel | int | Mapping[str, object] = ...,
            tensor_parallel: TensorParallel | int | Mapping[str, object] = ...,
            pipeline: Pipeline | int | Mapping[str, object] = ...,
            data_parallel: int | Literal["fill"] = ...,
            activation_checkpointing: ActivationCheckpointing | str | Mapping[str, object] = ...,
            precision: Precision | str | Mapping[str, object] = ...,
            compile: Compile | bool | Literal["auto"] | Mapping[str, object] = ...,
            checkpoint: Checkpoint | int | Mapping[str, object] = ...,
            placement: str | None = ...,
        ) -> None: ...
