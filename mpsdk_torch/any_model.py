"""Tensor parallelism and sharding for a module that mpsdk has no family for: by its own plan, by twins, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mpsdk.errors import ConfigError, Problem
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.layout import Config, agree, current, lay_out
from mpsdk_torch.register import Twin, make_twin, mark_of, marked
from mpsdk_torch.register import problems_of as problems_of_twin
from mpsdk_torch.shares import WHOLE, Shares
from mpsdk_torch.tensor_plan import Entry, TensorPlan, collapsed, cut_module, entries, own_plan, problems_of


def parallelize_model(
    model: nn.Module,
    config: Config | None = None,
    *,
    plan: TensorPlan | None = None,
    load_state_dict_from_rank0: bool = False,
) -> nn.Module:
    """Cut `model` over the tensor-parallel group where it stands, and give it back.

    First, modules with a registered twin that were made under `tensor_parallelism` become their twins. Then the plan is
    applied: the model's own, as models of transformers bring it, with `plan` over it. Without any plan the nn.Linear and
    nn.Embedding that were made under `tensor_parallelism` are cut. What nothing is said of is whole on each rank.

    Args:
        config: how to spread it, in any form of `Distribution`. None: as `mpsdk_torch.layout.lay_out` was told last.
        plan: a style (`mpsdk_torch.tensor_plan.STYLES`) by module name, with `*` for a block's number; None as a style leaves
            modules whole.
        load_state_dict_from_rank0: rank 0's model holds the weights, and the others' may be on the meta device. The ranks of
            rank 0's tensor-parallel group get their shares, all others stay without memory, for sharding to fill.

    Raises:
        ConfigError: everything that can't be cut, each with what to do instead. The model is then as it was.
        BackendError: on the other ranks, when rank 0 could not go on.
    """
    layout = current() if config is None else lay_out(config)
    group = TensorGroup() if layout is None else layout.tensor
    failure: ConfigError | None = None
    twins: list[tuple[str, nn.Module, Twin]] = []
    planned: list[Entry] = []
    try:
        twins, planned = _work(model, group, plan or {})
        if load_state_dict_from_rank0:
            _check_source(model, twins, group)
    except ConfigError as error:
        failure = error
    if load_state_dict_from_rank0:
        agree(failure, "parallelize_model")
    if failure is not None:
        raise failure
    if group.handle is None and not load_state_dict_from_rank0:
        return model
    shares = Shares(group, from_rank0=load_state_dict_from_rank0)
    for name, module, twin in twins:
        model.set_submodule(name, make_twin(name, module, twin, group))
    for entry in planned:
        cut_module(model, entry, group, shares)
    if load_state_dict_from_rank0:
        _share_the_rest(model, planned, shares)
    return model


def _work(
    model: nn.Module, group: TensorGroup, plan: TensorPlan
) -> tuple[list[tuple[str, nn.Module, Twin]], list[Entry]]:
    """What to do, or one ConfigError with all that stands against it."""
    outermost = list(marked(model))
    twins = [(name, module, twin) for name, module, twin in outermost if twin is not None]
    own = own_plan(model)
    planned, problems = entries(model, plan, own)
    inside = tuple(f"{name}." for name, _, _ in twins)
    planned = [entry for entry in planned if not f"{entry.name}.".startswith(inside)] if inside else planned
    if not own and not plan:
        planned = [_by_itself(name, module, group.size) for name, module, twin in outermost if twin is None]
        problems += _unknown_settings(outermost)
    if not planned and not twins and group.size > 1:
        problems.append(Problem("model", type(model).__name__, _nothing_to_cut(model)))
    problems += [problem for found in twins for problem in problems_of_twin(*found)]
    problems += problems_of(model, planned, group.size)
    if problems:
        raise ConfigError(problems, where=f"cutting {type(model).__name__} over {group.size} ranks")
    return twins, planned


def _check_source(model: nn.Module, twins: Sequence[object], group: TensorGroup) -> None:
    """Whether rank 0's model can give all ranks their weights."""
    problems: list[Problem] = []
    if twins and group.handle is not None:
        remedy = (
            "twins take over weights that each rank has; set it to False, with the whole model on every rank"
        )
        problems.append(Problem("load_state_dict_from_rank0", True, remedy))
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and (not dist.is_initialized() or dist.get_rank() == 0):
        remedy = "rank 0 gives all ranks their weights, so its model must not be on the meta device"
        problems.append(Problem("model", f"{empty[0]} on meta", remedy))
    if problems:
        raise ConfigError(problems, where="parallelize_model")


def _by_itself(name: str, module: nn.Module, size: int) -> Entry:
    """A layer whose neighbours nobody knows: it takes and gives whole tensors."""
    if isinstance(module, nn.Embedding):
        rows = module.num_embeddings % size == 0
        return Entry(name, module, "embedding_rowwise" if rows else "embedding_colwise")
    assert isinstance(module, nn.Linear)
    rows = module.out_features % size == 0 or module.in_features % size
    return Entry(name, module, "colwise_gather_output" if rows else "rowwise_split_input")


def _unknown_settings(outermost: Sequence[tuple[str, nn.Module, Twin | None]]) -> Iterator[Problem]:
    for name, module, twin in outermost:
        mark = mark_of(module)
        if twin is None and mark is not None and mark.settings:
            remedy = f"the twin of {type(module).__name__} has no such settings; leave them out"
            yield Problem(name, sorted(mark.settings), remedy)


def _nothing_to_cut(model: nn.Module) -> str:
    maps = [
        f"{name}.{child}" if child else name
        for name, block in find_blocks(model)[:1]
        for child, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    example = collapsed((maps or ["blocks.0.up"])[0])
    return (
        "brings no tensor-parallel plan, and none was given. Give one, such as "
        f"plan={{{example!r}: 'colwise', ...}}; or make it under tensor_parallelism(), with twins of its own modules by "
        "tp_register_with_module; or use sharded_data_parallel instead, which takes any module (mpsdk_torch.shard_model)"
    )


def _share_the_rest(model: nn.Module, planned: list[Entry], shares: Shares) -> None:
    """What is whole on every rank, and on rank 0 only so far."""
    cut = {
        id(parameter)
        for entry in planned
        if entry.cut is not None
        for parameter in model.get_submodule(entry.name).parameters()
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in cut:
                setattr(module, name, shares.share(parameter, WHOLE))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, shares.buffer(buffer))


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks: the members of the nn.ModuleList, nn.ModuleDict or nn.Sequential whose members are of one class,
    at least two, and hold the most parameters. Names with modules; empty where there is none."""
    best: list[tuple[str, nn.Module]] = []
    largest = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        members = [(f"{name}.{child}" if name else child, inner) for child, inner in module.named_children()]
        if len(members) < 2 or len({type(inner) for _, inner in members}) > 1:
            continue
        size = sum(parameter.numel() for _, inner in members for parameter in inner.parameters())
        if size > largest:
            best, largest = members, size
    return best


def shard_model(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Give any module to FSDP2: each of its repeated blocks as a unit, and the rest as one; gives it back.

    Args:
        mesh: `Layout.mesh["sdp"]`, or `["dp", "sdp"]` for replicas of shards.
        options: of `torch.distributed.fsdp.fully_shard`.

    Raises:
        ConfigError: a block shares a parameter with what is outside of it, or a parameter is a scalar; all of them.
    """
    blocks = find_blocks(model)
    problems = list(_unfit_for_units(model, [block for _, block in blocks]))
    if problems:
        raise ConfigError(problems, where=f"sharding {type(model).__name__}")
    for _, block in blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _unfit_for_units(model: nn.Module, blocks: list[nn.Module]) -> Iterator[Problem]:
    unit_of: dict[nn.Module, int] = {
        module: number for number, block in enumerate(blocks) for module in block.modules()
    }
    users: dict[torch.Tensor, list[tuple[str, int | None]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(parameter, []).append((f"{name}.{leaf}" if name else leaf, unit_of.get(module)))
    for parameter, found in users.items():
        names = [name for name, _ in found]
        if parameter.ndim == 0:
            yield Problem(names[0], (), "a scalar can't be sharded; make it a tensor of shape (1,)")
        if len({unit for _, unit in found}) > 1:
            remedy = (
                "is shared between blocks, and a parameter may belong to one unit only; give each block its own, or call "
                "fully_shard on the whole model"
            )
            yield Problem(" and ".join(names), tuple(parameter.shape), remedy)
