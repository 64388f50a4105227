"""A model's own tensor-parallel plan: module names with `*` for a block's number, and a style for each.

Models of transformers bring one (`base_model_tp_plan`); a user can add to it, or write one for any module. Styles and what each
takes and gives: `mpsdk_torch.nn.planned`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from mpsdk.errors import Problem
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.nn.planned import PlannedLinear, cut_embedding_features, cut_embedding_rows, sum_gradients
from mpsdk_torch.shares import Cut, Shares

logger = logging.getLogger(__name__)

TensorPlan = Mapping[str, str | None]
"""Style by pattern; None leaves the modules whole on every rank."""

_ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
_LINEAR = {
    "colwise": Cut(0),
    "packed_colwise": Cut(0, packed=2),
    "colwise_gather_output": Cut(0),
    "rowwise": Cut(1),
    "rowwise_split_input": Cut(1),
}
_EMBEDDING = {"embedding_rowwise": Cut(0), "embedding_colwise": Cut(1)}
_REPLICATED = ("replicate", "replicated_with_grad_allreduce")
STYLES = (*_LINEAR, *_EMBEDDING, *_REPLICATED)


@dataclass(frozen=True)
class Entry:
    """One module and its style."""

    name: str
    module: nn.Module
    style: str

    @property
    def cut(self) -> Cut | None:
        """How its weight is cut, None where it isn't."""
        return _LINEAR.get(self.style) or _EMBEDDING.get(self.style)


def collapsed(name: str) -> str:
    """The name with `*` for every number, as plans write it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def own_plan(model: nn.Module) -> dict[str, str]:
    """The plan that the model brings, under its modules' full names; empty where it brings none."""
    return dict(getattr(model, "tp_plan", None) or {})


def entries(model: nn.Module, plan: TensorPlan, own: Mapping[str, str]) -> tuple[list[Entry], list[Problem]]:
    """What each module is to become, by `plan` and, where that says nothing, by the model's own; and what is wrong with it.

    An embedding that is tied to a linear map which is cut by outputs is cut by rows with it.
    """
    modules = dict(model.named_modules())
    parameters = [name for name, _ in model.named_parameters()]
    problems = [
        Problem(
            f"plan[{pattern!r}]",
            stated,
            "matches no module; use names of the model's modules, * for numbers",
        )
        for pattern, stated in plan.items()
        if not any(_matches(name, pattern) for name in (modules if stated else (*modules, *parameters)))
    ]

    def style_of(name: str) -> str | None:
        style = own.get(collapsed(name))
        for pattern, stated in plan.items():
            if _matches(name, pattern):
                style = stated
        return style

    found: dict[str, Entry] = {}
    for name, module in modules.items():
        if (style := style_of(name)) is not None:
            found[name] = Entry(name, module, _ALIASES.get(style, style))
    of_parameters = {collapsed(name): style for name in parameters if (style := style_of(name)) is not None}
    for name, style in of_parameters.items():
        if name in own:
            remedy = f"is for a parameter, and mpsdk cuts modules; {_leave_whole(name)}, or register a twin of its module"
            problems.append(Problem(name, style, remedy))
    used = {collapsed(name) for name in (*modules, *parameters)}
    if absent := [pattern for pattern in own if pattern not in used]:
        logger.info("the model's own plan names modules that it does not have: %s", ", ".join(absent))
    for name, embedding in _tied_embeddings(model, found):
        if not any(_matches(name, pattern) for pattern in plan):
            found.setdefault(name, Entry(name, embedding, "embedding_rowwise"))
    return list(found.values()), problems


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(collapsed(name), pattern)


def _tied_embeddings(model: nn.Module, found: Mapping[str, Entry]) -> Iterator[tuple[str, nn.Embedding]]:
    cut = {
        id(entry.module.weight)
        for entry in found.values()
        if isinstance(entry.module, nn.Linear) and entry.cut == Cut(0)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in cut:
            yield name, module


def problems_of(model: nn.Module, found: list[Entry], size: int) -> Iterator[Problem]:
    """Everything that keeps these modules from being cut over `size` ranks, once for all blocks alike."""
    modules = dict(model.named_modules())
    alike = Counter((collapsed(entry.name), entry.style, type(entry.module)) for entry in found)
    said: set[tuple[str, str]] = set()
    for entry in found:
        name = collapsed(entry.name)
        if alike[name, entry.style, type(entry.module)] == 1:
            name = entry.name
        for remedy in _wrong_with(entry, name, modules[entry.name.rpartition(".")[0]], size):
            if (name, remedy) not in said:
                said.add((name, remedy))
                yield Problem(name, entry.style, remedy)
    yield from _torn_ties(model, found)
    yield from _unsaid(model, found)


def _wrong_with(entry: Entry, name: str, parent: nn.Module, size: int) -> Iterator[str]:
    module, style, kind = entry.module, entry.style, type(entry.module).__name__
    whole = _leave_whole(name)
    if style not in STYLES:
        yield f"mpsdk has no such style ({', '.join(STYLES)}); {whole}, or register a twin of your own for {kind}"
    elif style in _LINEAR and type(module) is not nn.Linear:
        yield f"is for nn.Linear, and this is {kind}; {whole}, or register a twin of your own with tp_register_with_module"
    elif style in _EMBEDDING and not isinstance(module, nn.Embedding):
        yield f"is for nn.Embedding, and this is {kind}; {whole}"
    elif isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        yield f"an embedding with max_norm or sparse gradients can't be cut; {whole}"
    elif entry.cut is not None and isinstance(module, nn.Linear | nn.Embedding):
        assert entry.cut.dimension is not None
        features, parts = module.weight.shape[entry.cut.dimension], size * entry.cut.packed
        heads = _heads(features, parent) if style == "colwise" else None
        if heads is not None and heads % size:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            yield f"its {heads} heads can't be shared by {size} ranks; a tensor_parallel.degree of {fitting} would do"
        elif features % parts:
            what = ("rows", "columns")[entry.cut.dimension]
            remedy = f"{_remedy(entry, features, size)}, or {whole}"
            yield f"{features} {what} of its weight can't be shared by {size} ranks; {remedy}"


def _leave_whole(name: str) -> str:
    return f"leave it whole with plan={{{name!r}: None}}"


def _remedy(entry: Entry, features: int, size: int) -> str:
    if entry.style == "embedding_rowwise" or "head" in entry.name:
        return f"pad the vocabulary with model.resize_token_embeddings(pad_to_multiple_of={size})"
    packed = entry.cut.packed if entry.cut is not None else 1
    fitting = ", ".join(str(n) for n in range(1, 65) if features % (n * packed) == 0)
    return f"a tensor_parallel.degree of {fitting} would do"


def _heads(features: int, parent: nn.Module) -> int | None:
    """How many heads a projection is for: its output is viewed as (..., heads, head_dim) by the attention around it."""
    size = getattr(parent, "head_dim", None)
    return features // size if isinstance(size, int) and size and features % size == 0 else None


def _torn_ties(model: nn.Module, found: list[Entry]) -> Iterator[Problem]:
    """A tensor that two modules share must be cut alike in both."""
    cuts = {entry.name: entry.cut for entry in found}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if leaf == "weight":
                users.setdefault(id(parameter), []).append(name)
    for names in users.values():
        if len({cuts.get(name) for name in names}) > 1:
            neither = ", ".join(f"{name!r}: None" for name in names)
            remedy = f"they share their weight, so cut both alike or neither: plan={{{neither}}}"
            yield Problem(" and ".join(names), [cuts.get(name) for name in names], remedy)


def _unsaid(model: nn.Module, found: list[Entry]) -> Iterator[Problem]:
    """Parameters beside a map whose features stay apart: on a rank's own features, their gradients are in parts too."""
    planned = {entry.name for entry in found}
    said: set[str] = set()
    for entry in found:
        parent = entry.name.rpartition(".")[0]
        if entry.style not in ("colwise", "packed_colwise") or not parent:
            continue
        for leaf, _ in model.get_submodule(parent).named_parameters(prefix=parent):
            owner = leaf.rpartition(".")[0]
            if collapsed(owner) in said or any(
                owner == name or owner.startswith(f"{name}.") for name in planned
            ):
                continue
            said.add(collapsed(owner))
            if owner == parent:
                got, remedy = (
                    leaf.rpartition(".")[2],
                    "leave all of its modules whole, or register a twin for it",
                )
            else:
                got = type(model.get_submodule(owner)).__name__
                remedy = (
                    "say in a plan what it works on: 'replicate' for whole features, 'replicated_with_grad_allreduce' for each "
                    "rank's own"
                )
            beside = entry.name.rpartition(".")[2]
            remedy = f"has parameters beside {beside}, whose features are cut, and the plan leaves it out; {remedy}"
            yield Problem(collapsed(owner), got, remedy)


def cut_module(model: nn.Module, entry: Entry, group: TensorGroup, shares: Shares) -> None:
    """Make one module what its style says. Ranks of the group do this in the same order."""
    module = entry.module
    if isinstance(module, nn.Linear) and entry.cut is not None:
        model.set_submodule(entry.name, _linear(module, entry, group, shares))
    elif isinstance(module, nn.Embedding) and entry.cut is not None:
        module.weight = shares.share(module.weight, entry.cut)
        cut_embedding = cut_embedding_rows if entry.cut.dimension == 0 else cut_embedding_features
        cut_embedding(module, group)
    elif entry.style == "replicated_with_grad_allreduce":
        sum_gradients(module, group)


def _linear(module: nn.Linear, entry: Entry, group: TensorGroup, shares: Shares) -> PlannedLinear:
    assert entry.cut is not None
    row = entry.cut.dimension == 1
    with torch.device("meta"):
        made = PlannedLinear(
            module.in_features,
            module.out_features,
            cut="row" if row else "column",
            whole=entry.style in ("colwise_gather_output", "rowwise_split_input"),
            bias=module.bias is not None,
            group=group,
        )
    made.weight = shares.share(module.weight, entry.cut)
    if module.bias is not None:
        made.bias = shares.share(module.bias, Cut() if row else entry.cut)
    return made.train(module.training)
