"""A Hugging Face model of a known family as mpsdk's Transformer, for a training script of one's own.

    model = AutoModelForCausalLM.from_pretrained(...)      # on rank 0; the others make it on the meta device
    model = transform(model, {"tensor_parallel": 2, "sharded_data_parallel": 2})
    model = FullyShardedDataParallel(model, sync_module_states=True, ...)

Weights go from rank 0 to its tensor-parallel group, tensor by tensor, each rank its part. On the other ranks the result is on
the meta device, and sharding spreads the weights: see `mpsdk_torch.delayed_param`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.config import Distribution, Training
from mpsdk.description import TensorDescription
from mpsdk.errors import CheckpointError, ConfigError, Problem
from mpsdk.families import FAMILIES, Family, TransformerSpec
from mpsdk.families.describe import describe_spec
from mpsdk.families.layout import HfTensor, hf_tensors
from mpsdk.families.match import left_out, left_over, match, misshapen, respelt
from mpsdk.plan import LocalTensor, Plan
from mpsdk.resolve import resolve
from mpsdk_torch.comm import TensorGroup, enter_parallel
from mpsdk_torch.layout import Config, Layout, agree, current, device, lay_out
from mpsdk_torch.nn import Norm
from mpsdk_torch.transformer import Transformer


def transform(
    model: nn.Module, config: Config | None = None, load_state_dict_from_rank0: bool = True
) -> Transformer:
    """mpsdk's Transformer with the weights of `model`, cut over the tensor-parallel group if there is one.

    Args:
        model: a model of transformers, of one of the families that mpsdk knows and with any of its heads, on a device or
            on meta. Let go of it afterwards: tensors that need no rearranging are shared with it.
        config: how to spread it, in any form of `Distribution`. None: as `mpsdk_torch.layout.lay_out` was told last, else
            whole. The model repeats norms and residuals on tensor-parallel ranks; it has no sequence parallelism.
        load_state_dict_from_rank0: rank 0's model holds the weights. The ranks of its tensor-parallel group get their parts;
            all others get a model on the meta device. False: every rank takes its part of its own model, and what is on the
            meta device stays there.

    The result has the dtypes of `model`, is in training mode if `model` is, and freezes what `model` freezes. Its forward gives
    logits, under tensor parallelism those of this rank's rows of the vocabulary, see `mpsdk_torch.transformer.Transformer`;
    `mpsdk_torch.loss.cross_entropy_sum` takes them with `group=model.group`.

    Raises:
        ConfigError: a model of no known family or head, settings that its family can't express, degrees that don't fit.
        CheckpointError: tensors that are missing, left over or of another shape. Both list every problem.
        BackendError: on the other ranks, when rank 0 could not go on.
    """
    layout = current() if config is None else lay_out(config)
    local: list[LocalTensor] | None = None
    failure: Exception | None = None
    try:
        family, spec = _read(model)
        plan = _plan(spec, layout)
        parts = [plan.stage_tensors(0, tp) for tp in range(plan.degrees.tp)]
        tp = 0 if layout is None else layout.coordinates.tp
        local = list(parts[tp])
        weights = _Weights(model, family, spec)
        if load_state_dict_from_rank0 and _rank() == 0:
            weights.refuse_meta()
    except (ConfigError, CheckpointError) as error:
        failure = error
    if load_state_dict_from_rank0:
        agree(failure, "transform")
    if failure is not None or local is None:
        raise failure or AssertionError("no failure, and nothing read")

    group = TensorGroup() if layout is None else layout.tensor
    with torch.device("meta"):
        made = Transformer(spec, vocab_rows=plan.padded_vocab_size, group=group)
    _sum_gradients_of_heads(made, group)
    fill = _Fill(weights, group, parts, from_rank0=load_state_dict_from_rank0)
    for number, held in enumerate(local):
        values = fill.tensor(number)
        owner, _, leaf = held.name.rpartition(".")
        parameter = nn.Parameter(values, requires_grad=weights.trains(held.name))
        made.get_submodule(owner).register_parameter(leaf, parameter)
    return made.train(model.training)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _read(model: nn.Module) -> tuple[Family, TransformerSpec]:
    """The family and the spec of a model of transformers."""
    config = getattr(model, "config", None)
    kind = type(model).__name__
    model_type = getattr(config, "model_type", None)
    if config is None or not isinstance(model_type, str) or model_type not in FAMILIES:
        remedy = (
            f"transform knows models of transformers of these types: {', '.join(sorted(FAMILIES))}; for any other model use "
            "mpsdk_torch.parallelize_model"
        )
        got = kind if model_type is None else f"{kind} of model_type {model_type!r}"
        raise ConfigError([Problem("model", got, remedy)], where="transform")
    family = FAMILIES[model_type]
    bases = {base.__name__ for base in type(model).__mro__}
    known = [head.architecture for head in family.heads]
    named = [name for name in known if name in bases]
    if not named:
        remedy = f"its head is none that mpsdk knows of {model_type} models; give one of {', '.join(known)}"
        raise ConfigError([Problem("model", kind, remedy)], where="transform")
    return family, family.spec({**config.to_dict(), "architectures": named[:1]})


def _plan(spec: TransformerSpec, layout: Layout | None) -> Plan:
    """Who holds which part: the plan of the layout, for any data."""
    distribution = Distribution() if layout is None else layout.distribution
    section = distribution.tensor_parallel
    stated = "sequence_parallel" in section.model_fields_set and section.sequence_parallel
    if stated and section.degree > 1:
        remedy = "a transformed model repeats norms on every tensor-parallel rank; leave it out, or train with the Estimator"
        raise ConfigError([Problem("tensor_parallel.sequence_parallel", True, remedy)], where="transform")
    degrees = None if layout is None else layout.topology.degrees
    world = 1 if degrees is None else degrees.dp * degrees.sdp * degrees.tp
    training = Training(
        objective=spec.head.objective, global_batch=world, sequence_length=section.degree, steps=1
    )
    plan = resolve(distribution, describe_spec(spec), training, world_size=world, framework="torch")
    rows = -(-spec.vocab_size // section.degree) * section.degree  # no more padding than the cut asks for
    return plan.model_copy(update={"padded_vocab_size": rows})


class _Weights:
    """The tensors of a model of transformers under canonical names, slice by slice, as views where they can be."""

    def __init__(self, model: nn.Module, family: Family, spec: TransformerSpec) -> None:
        state = {respelt(name, family): tensor for name, tensor in model.state_dict().items()}
        self._trains = {
            respelt(name, family): parameter.requires_grad
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        tensors = hf_tensors(family.rules(spec.head.objective), describe_spec(spec))
        matched = match(tensors, state, "")
        problems = [
            *left_out(tensors, matched),
            *misshapen(tensors, matched),
            *left_over(state, matched, family, spec),
            *_quantised(matched),
        ]
        if problems:
            raise CheckpointError(
                "\n  ".join([f"{type(model).__name__} does not fit its config:", *problems])
            )
        self._state = matched
        self._where: dict[str, tuple[HfTensor, TensorDescription]] = {}
        for tensor in tensors:
            if tensor.name in matched:
                self._where |= {part.name: (tensor, part) for part in tensor.parts}

    def refuse_meta(self) -> None:
        """Raise ConfigError if a tensor has no values."""
        if empty := [name for name, tensor in self._state.items() if tensor.is_meta]:
            remedy = (
                "rank 0 gives all ranks their weights, so its model must not be on the meta device; or set "
                "load_state_dict_from_rank0=False"
            )
            raise ConfigError([Problem("model", f"{empty[0]} on meta", remedy)], where="transform")

    def trains(self, name: str) -> bool:
        return self._trains.get(self._where[name][0].name, True)

    def dtype(self, name: str) -> torch.dtype:
        return self._state[self._where[name][0].name].dtype

    @torch.no_grad()
    def part(self, held: LocalTensor) -> Tensor:
        """What a rank holds of a tensor; rows of padding are zero. It may share memory with the model."""
        tensor, part = self._where[held.name]
        stored = self._state[tensor.name]
        found = [stored[there] for there, _ in tensor.pieces(part, held.offset, held.valid)]
        pieces = [piece.t() if tensor.transpose else piece for piece in found]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else stored.new_empty(0)
        if held.valid == held.shape:
            return values.detach().contiguous()
        padded = stored.new_zeros(held.shape)
        padded[tuple(slice(size) for size in held.valid)] = values.reshape(held.valid)
        return padded


def _quantised(matched: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in matched.items():
        if not tensor.is_floating_point():
            yield f"wrong type: {name} is {tensor.dtype}; quantised weights can't be trained"


class _Fill:
    """Gives this rank its part of each tensor, in the plan's order, which is the same on all ranks."""

    def __init__(
        self,
        weights: _Weights,
        group: TensorGroup,
        parts: list[tuple[LocalTensor, ...]],
        *,
        from_rank0: bool,
    ) -> None:
        self._weights, self._group, self._parts, self._from_rank0 = weights, group, parts, from_rank0
        ranks = [_rank()] if group.handle is None else dist.get_process_group_ranks(group.handle)
        self._gets_values = 0 in ranks

    def tensor(self, number: int) -> Tensor:
        held = self._parts[self._group.rank][number]
        if not self._from_rank0:
            values = self._weights.part(held)
            cut = self._group.handle is not None
            return values.clone() if cut and not values.is_meta else values
        if not self._gets_values:
            return torch.empty(held.shape, dtype=self._weights.dtype(held.name), device="meta")
        if self._group.handle is None:
            return self._weights.part(held)
        own = torch.empty(held.shape, dtype=self._weights.dtype(held.name), device=device())
        there = None
        if _rank() == 0:
            there = [self._weights.part(parts[number]).to(own.device) for parts in self._parts]
        dist.scatter(own, there, src=0, group=self._group.handle)
        return own


class _NormOfHeads(Norm):
    """A norm over each head. A rank's gradient is of its own heads, and the backward sums it over the group."""

    group: TensorGroup

    def forward(self, hidden: Tensor) -> Tensor:
        weight = enter_parallel(self.weight, self.group)
        return nn.functional.rms_norm(hidden, (self.width,), weight, self.epsilon)


def _sum_gradients_of_heads(model: Transformer, group: TensorGroup) -> None:
    """In mpsdk's own loop the optimizer does this; here nobody else would."""
    if group.handle is None:
        return
    for block in model.blocks.values():
        attention = block.attention
        for name in ("query_norm", "key_norm"):
            norm = getattr(attention, name)
            if norm is not None:
                with torch.device("meta"):
                    summed = _NormOfHeads(norm.width, kind=norm.kind, epsilon=norm.epsilon)
                summed.group = group
                setattr(attention, name, summed)
