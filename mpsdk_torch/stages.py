"""One pipeline stage of a module that mpsdk did not make: split by hand at its blocks, never traced.

A model of transformers says by its pipeline plan (`base_model_pp_plan`) which of its modules is the embedding, which list holds
the blocks and what follows them. The stage keeps the model's own forward: blocks of other stages pass hidden states on, so that
block numbers, which choose masks and windows, and parameter names stay what they were. An nn.Sequential is split between its
members.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpsdk.errors import ConfigError, Problem

HOW_ELSE = (
    "use tensor_parallel or sharded_data_parallel, which need no stages; or give an nn.Sequential, which is split between its "
    "members"
)


class _Parts(NamedTuple):
    """The modules of a model, by its plan."""

    embedding: str
    blocks: str
    tail: tuple[str, ...]  # between the blocks and the head
    head: str | None


class _Passed(nn.Module):
    """A block that another stage owns: hidden states go through as they are."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class PipelinePart(nn.Module):
    """Blocks [start, stop) of a model, with its embedding if `first` and its head if `last`.

    Forward: token ids (batch, length) if first, else hidden states (batch, length, width), and what the model's own forward
    takes besides, such as `attention_mask`; gives hidden states, or, if last, logits.
    """

    def __init__(self, model: nn.Module, *, first: bool, last: bool) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last

    def forward(self, inputs: Tensor, **settings: Any) -> Tensor:
        given = {"input_ids" if self.first else "inputs_embeds": inputs}
        model: Any = self.model if self.last else self.model.base_model
        output = model(**given, use_cache=False, **settings)
        return getattr(output, "logits", output[0]) if self.last else output.last_hidden_state


def pipeline_stage(model: nn.Module, start: int, stop: int) -> nn.Module:
    """The stage of `model` that owns blocks [start, stop), made of `model` itself, which is then no longer whole.

    The first stage keeps the embedding and the last the head. Where these two share a weight, each has a copy of it, and the
    sum of both gradients is the whole model's: see `tied_weight`.

    Raises:
        ConfigError: the model is no nn.Sequential and brings no pipeline plan, its plan names what it doesn't have, its forward
            does something between the parts that its plan names, or there are no such blocks. All that is wrong, and what else
            to do.
    """
    if isinstance(model, nn.Sequential):
        _check_range(start, stop, len(model), type(model).__name__)
        for number in range(len(model)):
            if not start <= number < stop:
                model[number] = nn.Identity()
        return model
    parts = _parts(model)
    blocks = model.get_submodule(parts.blocks)
    assert isinstance(blocks, nn.ModuleList)
    _check_range(start, stop, len(blocks), type(model).__name__)
    _check_nothing_between(model, parts)
    first, last = start == 0, stop == len(blocks)
    for number in range(len(blocks)):
        if not start <= number < stop:
            blocks[number] = _Passed()
    if not first:
        _leave_out(model, parts.embedding)
    if not last:
        for name in parts.tail:
            model.set_submodule(name, nn.Identity())
        if parts.head is not None:
            _leave_out(model, parts.head)
    return PipelinePart(model, first=first, last=last)


def tied_weight(stage: nn.Module) -> nn.Parameter | None:
    """What the first and the last stage both have a copy of, whose gradients are to be summed; None: there is nothing."""
    if not isinstance(stage, PipelinePart) or stage.first == stage.last:
        return None
    config: Any = getattr(stage.model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return None
    model: Any = stage.model
    return (model.get_input_embeddings() if stage.first else model.get_output_embeddings()).weight


def _parts(model: nn.Module) -> _Parts:
    plan: Mapping[str, Any] = getattr(model, "pp_plan", None) or {}
    modules = dict(model.named_modules())
    kind = type(model).__name__
    if not plan:
        raise _refusal(kind, Problem("model", kind, f"brings no pipeline plan; {HOW_ELSE}"))
    if absent := [name for name in plan if name not in modules]:
        raise _refusal(
            kind,
            *(
                Problem(name, kind, f"is in its pipeline plan and not in the model; {HOW_ELSE}")
                for name in absent
            ),
        )
    embedding = [name for name, (takes, _) in plan.items() if "input_ids" in takes]
    blocks = [name for name in plan if isinstance(modules[name], nn.ModuleList)]
    head = [name for name, (_, gives) in plan.items() if "logits" in gives]
    if len(embedding) != 1 or len(blocks) != 1 or len(head) > 1:
        remedy = f"has not one embedding, one list of blocks and one head at most; {HOW_ELSE}"
        raise _refusal(kind, Problem("pp_plan", list(plan), remedy))
    tail = tuple(name for name in plan if name not in (*embedding, *blocks, *head))
    return _Parts(embedding[0], blocks[0], tail, head[0] if head else None)


def _check_range(start: int, stop: int, blocks: int, kind: str) -> None:
    if not 0 <= start < stop <= blocks:
        remedy = f"must be blocks of the model, which has {blocks}, numbered from 0"
        raise _refusal(kind, Problem("blocks", (start, stop), remedy))


def _leave_out(model: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, None)


@torch.no_grad()
def _check_nothing_between(model: Any, parts: _Parts) -> None:
    """Hidden states must go through the model without its blocks and tail unchanged, or every stage would change them again."""
    kind = type(model).__name__
    if empty := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        remedy = "has no values; make the model under delay_param_initialization, which keeps its buffers"
        raise _refusal(kind, *(Problem(name, "meta", remedy) for name in empty))
    replaced = dict(_replaced(model, parts))
    width = model.config.get_text_config().hidden_size
    hidden = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    device = next((buffer.device for _, buffer in model.named_buffers()), torch.device("cpu"))
    try:
        found = model.base_model(inputs_embeds=hidden.to(device), use_cache=False).last_hidden_state
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)
    if not torch.equal(found.cpu(), hidden):
        remedy = f"changes hidden states between its parts, which every stage would do again; {HOW_ELSE}"
        raise _refusal(kind, Problem("pp_plan", [parts.embedding, parts.blocks, *parts.tail], remedy))


def _replaced(model: nn.Module, parts: _Parts) -> Iterator[tuple[str, nn.Module]]:
    """Put modules that change nothing in the place of blocks and tail; gives those that were there."""
    blocks = model.get_submodule(parts.blocks)
    yield parts.blocks, blocks
    model.set_submodule(parts.blocks, nn.ModuleList(_Passed() for _ in blocks.children()))
    for name in parts.tail:
        yield name, model.get_submodule(name)
        model.set_submodule(name, nn.Identity())


def _refusal(kind: str, *problems: Problem) -> ConfigError:
    return ConfigError(problems, where=f"a pipeline stage of {kind}")
