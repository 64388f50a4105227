"""Models whose parameters get memory late: when sharding has divided them, one module at a time.

Rank 0 loads the weights, the others make the model without memory, and PyTorch's FSDP spreads rank 0's weights unit by unit:

    if dist.get_rank() == 0:
        model = AutoModelForCausalLM.from_pretrained(...)
    else:
        with delay_param_initialization():
            model = AutoModelForCausalLM.from_config(...)
    delayed = DelayedParamIniter(model) if dist.get_rank() > 0 else None
    with delayed.validate_params_and_buffers_inited() if delayed else nullcontext():
        model = FSDP(
            model, sync_module_states=True, param_init_fn=delayed.get_param_init_fn() if delayed else None, ...
        )

With FSDP2: `fully_shard` first, then `model.apply(delayed.get_param_init_fn())`, then `set_model_state_dict` with
`broadcast_from_rank0`, or `load_from_first`, which tensor parallelism asks for.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from mpsdk.backend import WEIGHT
from mpsdk.errors import BackendError
from mpsdk.families.describe import describe_spec
from mpsdk.initialise import RandomSource
from mpsdk_torch.transformer import Transformer

logger = logging.getLogger(__name__)

Initialise = Callable[[nn.Module], None]


@contextmanager
def delay_param_initialization(enabled: bool = True) -> Iterator[None]:
    """Within, or in a function decorated with it, modules make parameters on the meta device, and buffers in memory.

    A parameter is dropped before anything is written to it, so that a model of any size takes no memory. Buffers, such as
    rotary tables, keep their values. `torch.device("meta")` delays buffers too; then a model's own method must make them again.

    >>> with delay_param_initialization():
    ...     layer = nn.BatchNorm1d(3)
    >>> layer.weight.device.type, layer.running_var.tolist()
    ('meta', [1.0, 1.0, 1.0])
    """
    if not enabled:
        yield
        return
    hook: Any = _without_memory  # torch's stub has a hook give nothing; its documentation, another value
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _without_memory(module: nn.Module, name: str, parameter: Tensor | None) -> Tensor | None:
    if parameter is None or parameter.is_meta:  # one that is registered again is tied, and stays so
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


class DelayedParamIniter:
    """Gives memory and first values to a model whose parameters are on the meta device.

    Args:
        model: the model as it was made, before FSDP.
        init_method_using_config: gives a module's own parameters and buffers (not its children's) their first values. None: an
            mpsdk Transformer starts as a run with `seed` does; a model of transformers by its own `_init_weights`; any other
            by its modules' `reset_parameters`. What nobody gives a value is NaN, until rank 0's weights arrive.
        verbose: log each module at level INFO.
        seed: of an mpsdk Transformer's first values.
        device: where to. None: the current GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        init_method_using_config: Initialise | None = None,
        verbose: bool = False,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self._model, self._verbose = model, verbose
        gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._device = torch.device(device or gpu or "cpu")
        self._initialise = init_method_using_config or _first_values(model, seed)
        self._names = {module: name for name, module in model.named_modules()}
        sites: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in self._names:
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.is_meta:
                    sites.setdefault(parameter, []).append((module, name))
        self._expected = sum(parameter.numel() for parameter in sites)
        # By where it stands: FSDP2 puts others in the place of the parameters that it cuts.
        self._tied = {site: found[0] for found in sites.values() if len(found) > 1 for site in found}
        # Not held here: a unit's whole parameters must go when FSDP has cut them.
        self._made: weakref.WeakValueDictionary[tuple[nn.Module, str], nn.Parameter] = (
            weakref.WeakValueDictionary()
        )
        self._inited = 0

    def get_param_init_fn(self) -> Callable[[nn.Module], None]:
        """For FSDP1's `param_init_fn`, or `Module.apply` after FSDP2: gives one module's own parameters and buffers memory
        and values. Ties between modules stay. A module that has nothing on the meta device is left as it is."""
        return self._materialise

    def get_post_param_init_fn(self) -> Callable[[nn.Module], None]:
        """Ties weights again by the model's own `tie_weights`, once all of its parameters are there.

        PyTorch's FSDP has no argument for it. It is for models whose `init_method_using_config` unties what was tied.
        """
        return _tie_weights

    def count_num_params(self, module: nn.Module, *parameters: nn.Parameter) -> int:
        """Note that these parameters of `module` have got their memory; gives how many elements have so far."""
        self._inited += sum(parameter.numel() for parameter in parameters)
        if self._verbose:
            where = self._names.get(module) or type(module).__name__
            logger.info("%s: %d of %d elements initialised", where, self._inited, self._expected)
        return self._inited

    @contextmanager
    def validate_params_and_buffers_inited(self, enabled: bool = True) -> Iterator[None]:
        """Raise AssertionError at the end unless everything that was on the meta device got memory, and each parameter once."""
        yield
        if not enabled:
            return
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        problems = [f"{name} is still on the meta device" for name, tensor in tensors if tensor.is_meta]
        if self._inited != self._expected:
            problems.append(f"{self._inited} elements were initialised, and {self._expected} waited for it")
        if problems:
            lines = "\n  ".join(problems)
            raise AssertionError(f"delayed initialisation is incomplete:\n  {lines}")

    @torch.no_grad()
    def _materialise(self, module: nn.Module) -> None:
        parameters = list(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = list(module.named_buffers(recurse=False, remove_duplicate=False))
        if not any(tensor.is_meta for _, tensor in (*parameters, *buffers)):
            return
        made: list[nn.Parameter] = []
        for name, parameter in parameters:
            if parameter.is_meta:
                setattr(module, name, self._with_memory((module, name), parameter, made))
        for name, buffer in buffers:
            setattr(module, name, _empty(buffer, self._device) if buffer.is_meta else buffer.to(self._device))
        if isinstance(self._initialise, _Initial):
            self._initialise(module)
        else:
            self._initialise_whole(module)
        self.count_num_params(module, *made)

    def _initialise_whole(self, module: nn.Module) -> None:
        """Initialise tensors that FSDP2 has cut as whole ones, one module at a time, and keep this rank's rows.

        The values are those of an uncut model where ranks have the same random numbers. On DTensors themselves torch would
        first agree on random numbers with ranks that are not here.
        """
        cut: dict[str, DTensor] = {}
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device)
                cut[name] = parameter
                setattr(module, name, nn.Parameter(_empty(whole, self._device), parameter.requires_grad))
        self._initialise(module)
        for name, parameter in cut.items():
            rows, start = parameter.to_local(), _first_row(parameter)
            rows.copy_(getattr(module, name)[start : start + rows.shape[0]])
            setattr(module, name, parameter)

    def _with_memory(
        self, site: tuple[nn.Module, str], parameter: nn.Parameter, made: list[nn.Parameter]
    ) -> nn.Parameter:
        owner = self._tied.get(site)
        if owner is not None and (earlier := self._made.get(owner)) is not None:
            return earlier
        new = nn.Parameter(_empty(parameter, self._device), requires_grad=parameter.requires_grad)
        made.append(new)
        if owner is not None:
            self._made[owner] = new
        return new


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory, with a value that shows when nobody writes another."""
    made = torch.empty_like(tensor, device=device)
    return made.fill_(math.nan) if made.is_floating_point() else made.zero_()


def _tie_weights(model: nn.Module) -> None:
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _first_values(model: nn.Module, seed: int) -> Initialise:
    if isinstance(model, Transformer):
        return _Initial(model, seed)
    own = getattr(model, "_init_weights", None)  # what transformers asks every model to have
    return _reset if own is None else own


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


class _Initial:
    """The values that a run starts with, each rank's part of each tensor by itself."""

    def __init__(self, model: Transformer, seed: int) -> None:
        description = describe_spec(model.spec)
        self._source = RandomSource(description, seed)
        self._tensors = {tensor.name: tensor for tensor in description.tensors()}
        self._group = model.group
        self._names = {module: name for name, module in model.named_modules()}

    def __call__(self, module: nn.Module) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            tensor = self._tensors[f"{self._names[module]}.{leaf}"]
            offset = [0] * parameter.ndim
            local = parameter
            if tensor.cut_dimension is not None:
                offset[tensor.cut_dimension] = self._group.rank * parameter.shape[tensor.cut_dimension]
            if isinstance(parameter, DTensor):
                local = parameter.to_local()
                offset[0] += _first_row(parameter)
            shape = [
                max(0, min(size, whole - start))
                for start, size, whole in zip(offset, local.shape, tensor.shape, strict=True)
            ]
            place = tuple(slice(size) for size in shape)
            local.zero_()  # rows that only pad the vocabulary stay so
            if 0 not in shape:
                values = self._source.read(tensor.name, WEIGHT, tuple(offset), tuple(shape))
                local[place] = torch.from_numpy(np.ascontiguousarray(values)).to(local)


def _first_row(parameter: DTensor) -> int:
    """Where this rank's rows begin. FSDP2 cuts dimension 0 over the last axis of its mesh, as torch.chunk does."""
    mesh, placement = parameter.device_mesh, parameter.placements[-1]
    assert placement == Shard(0), placement
    axis = mesh.ndim - 1
    rows = -(-parameter.shape[0] // mesh.size(axis)) * mesh.get_local_rank(axis)
    return min(rows, parameter.shape[0])


@torch.no_grad()
def load_from_first(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a model that FSDP2 has cut from the whole tensors that the first rank of its mesh has, one tensor at a time.

    Under tensor parallelism the ranks with the same tensor-parallel coordinate are a mesh of their own, with the first of them
    its source; `set_model_state_dict` with `broadcast_from_rank0` knows one source for the world.

    Args:
        weights: `model.state_dict()` from before `fully_shard` on the first rank of the mesh, {} on the others.

    Raises:
        BackendError: a parameter or persistent buffer that the first rank's `weights` lack, or that FSDP2 has not cut.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise BackendError(f"{name} is not cut by FSDP2; call fully_shard on the whole model first")
        mesh, device = parameter.device_mesh, parameter.to_local().device
        whole = _whole(weights, name, parameter, mesh, device)
        parameter.copy_(distribute_tensor(whole, mesh, parameter.placements))


def _whole(
    weights: Mapping[str, Tensor], name: str, parameter: DTensor, mesh: DeviceMesh, device: torch.device
) -> Tensor:
    if any(mesh.get_coordinate() or ()):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if name not in weights:
        raise BackendError(f"the first rank of {mesh} has no weights of {name!r} on rank {dist.get_rank()}")
    return weights[name].detach().to(device, parameter.dtype)
