"""What a pool's workers run: a model of transformers on rank 0 alone, spread over the others; and what each has then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.backend import Place
from mpsdk.families.describe import describe_spec
from tests.torch.memory import Memory

VOCABULARY = 61  # odd: tensor parallelism pads it
DROPLESS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPENAI = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 4, "n_layer": 6, "n_positions": 32, "bos_token_id": 1,
          "eos_token_id": 1, "pad_token_id": 0, **DROPLESS}  # fmt: skip
USUAL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 6,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
ENCODER = USUAL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GATED = USUAL | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": OPENAI,
    "bert": ENCODER,
    "roberta": ENCODER | {"pad_token_id": 1},
    "gptj": OPENAI | {"rotary_dim": 2},
    "gpt_neo": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_heads": 4, "num_layers": 6, "intermediate_size": 24,
                "max_position_embeddings": 32, "attention_types": [[["global", "local"], 3]], "window_size": 3,
                "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
    "gpt_neox": USUAL | {"bos_token_id": 1, "eos_token_id": 1, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "llama": GATED | {"attention_bias": True},
    "llama-tied": GATED | {"tie_word_embeddings": True},
    "mistral": GATED | {"sliding_window": 3},
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 4},
}  # fmt: skip
ENCODERS = ("bert", "roberta")
HEADS = ("CausalLM", "MaskedLM", "SequenceClassification", "TokenClassification")


class Seen(NamedTuple):
    """What a rank saw: the tensors that differ from the whole model's, how far its logits lie from transformers', which
    gradients lie too far from the whole model's, and the most elements that it held at once while it got its weights."""

    wrong: list[str]
    distance: float
    wrong_gradients: list[str]
    peak: int
    elements: int


def make_model(name: str, head: str | None = None) -> Any:
    """The same weights wherever it is called; norms and biases are random too. `head`: None is a language model's."""
    import transformers

    head = head or ("MaskedLM" if name in ENCODERS else "CausalLM")

    family = name.removesuffix("-tied")
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[name])
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + float(norm))
    return model.eval()


def make_ids() -> Tensor:
    return (torch.arange(2 * 9).reshape(2, 9) * 7 + 3) % (VOCABULARY - 2) + 2


def spread(place: Place, name: str, config: dict[str, Any], how: str) -> Seen:
    """Rank 0 alone has the weights; `how` is the sharding that spreads them: "fsdp1", "fsdp2" or "" for none."""
    from mpsdk_torch.delayed_param import delay_param_initialization
    from mpsdk_torch.topology import join
    from mpsdk_torch.transformed import transform

    join(place)
    try:
        with nullcontext() if place.rank == 0 else delay_param_initialization():
            original = make_model(name)
        with Memory(watch_peak=True) as memory:
            model = transform(original, config)
            wrapped, weights = _SPREAD[how](model)
        reference = make_model(name)
        whole_model = _whole(reference)
        whole = dict(whole_model.named_parameters())
        wrong = _differing(model, weights(), whole)
        with torch.no_grad():
            logits = _gathered(wrapped(make_ids()), model)[..., :VOCABULARY]
            expected = reference(make_ids()).logits
        distance = float((logits - expected).abs().max() / expected.abs().max())
        wrong_gradients = [] if how else _wrong_gradients(model, whole_model)
        return Seen(
            wrong, distance, wrong_gradients, memory.peak // 4, sum(p.numel() for p in whole.values())
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _whole(reference: Any) -> Any:
    """The whole model, as a process of its own would have it."""
    from mpsdk_torch import layout, transform

    kept, layout._current[:] = layout._current[:], []
    try:
        return transform(reference, None, load_state_dict_from_rank0=False)
    finally:
        layout._current[:] = kept


def _differing(model: Any, found: dict[str, Tensor], whole: dict[str, nn.Parameter]) -> list[str]:
    """Which tensors are not, bit for bit, this rank's part of the whole."""
    parts = _parts(model, whole)
    return sorted(found.keys() ^ parts.keys()) + [
        name for name in found.keys() & parts.keys() if not torch.equal(found[name], parts[name])
    ]


def _wrong_gradients(model: Any, whole: Any) -> list[str]:
    """Which gradients of a language model's loss are not this rank's part of those of the whole model."""
    from mpsdk_torch.loss import cross_entropy_sum

    ids = make_ids()
    labels = ids.roll(-1, dims=1)
    cross_entropy_sum(model(ids), labels, vocab_size=VOCABULARY, group=model.group).backward()
    nn.functional.cross_entropy(whole(ids).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    floor = 1e-9 * max(float(gradient.abs().max()) for gradient in expected.values())
    parts = _parts(model, expected)
    wrong: list[str] = []
    for name, parameter in model.named_parameters():
        bound = 1e-5 * float(expected[name].abs().max()) + floor
        if name.endswith("key.bias") and model.spec.rotary is None:
            bound = 1e3 * floor  # zero, but for rounding: every score of a query moves alike
        if not float((parameter.grad - parts[name]).abs().max()) <= bound:
            wrong.append(name)
    return wrong


def _parts(model: Any, whole: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's part of each whole tensor."""
    tensors = {tensor.name: tensor for tensor in describe_spec(model.spec).tensors()}
    parts: dict[str, Tensor] = {}
    for name, values in whole.items():
        values, cut, size = values.detach(), tensors[name].cut_dimension, model.group.size
        if cut is not None:
            padding = (-values.shape[cut]) % size if tensors[name].role == "vocab" else 0
            padded = torch.cat([values, values.new_zeros(padding, *values.shape[1:])])
            values = padded.chunk(size, cut)[model.group.rank]
        parts[name] = values
    return parts


def _gathered(logits: Tensor, model: Any) -> Tensor:
    if model.group.handle is None:
        return logits
    parts = [torch.empty_like(logits) for _ in range(model.group.size)]
    dist.all_gather(parts, logits.contiguous(), group=model.group.handle)
    return torch.cat(parts, dim=-1)


def _alone(model: Any) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    return model, lambda: dict(model.named_parameters())


@contextmanager
def syncing_on_cpu() -> Iterator[None]:
    """torch refuses `sync_module_states` for tensors on a CPU; within, that one check is left out, because the broadcast
    behind it works with gloo."""
    from torch.distributed.fsdp import _init_utils

    check = _init_utils._check_module_states_for_sync_module_states
    _init_utils._check_module_states_for_sync_module_states = lambda states: None
    try:
        yield
    finally:
        _init_utils._check_module_states_for_sync_module_states = check


def _with_fsdp1(model: Any) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """As the published example has it."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from mpsdk_torch.delayed_param import DelayedParamIniter
    from mpsdk_torch.layout import current
    from mpsdk_torch.transformer import Block

    delayed = DelayedParamIniter(model) if next(model.parameters()).is_meta else None
    with syncing_on_cpu(), delayed.validate_params_and_buffers_inited() if delayed else nullcontext():
        wrapped = FullyShardedDataParallel(
            model,
            process_group=current().mesh["sdp"].get_group(),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sync_module_states=True,
            param_init_fn=delayed.get_param_init_fn() if delayed else None,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )

    def weights() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return {
                name.replace("_fsdp_wrapped_module.", ""): parameter.detach().clone()
                for name, parameter in wrapped.named_parameters()
            }

    return wrapped, weights


def _with_fsdp2(model: Any) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    from mpsdk_torch.delayed_param import DelayedParamIniter, load_from_first
    from mpsdk_torch.layout import current

    delayed = DelayedParamIniter(model) if next(model.parameters()).is_meta else None
    whole = {} if delayed else model.state_dict()
    mesh = current().mesh["sdp"]
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with delayed.validate_params_and_buffers_inited() if delayed else nullcontext():
        if delayed:
            model.apply(delayed.get_param_init_fn())
    if model.group.handle is None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole, options=options)
    else:
        load_from_first(model, whole)
    return model, lambda: {name: p.full_tensor() for name, p in model.named_parameters()}


_SPREAD = {"": _alone, "fsdp1": _with_fsdp1, "fsdp2": _with_fsdp2}


def start_cut_and_sharded(place: Place, config: dict[str, Any]) -> list[str]:
    """Which tensors of an mpsdk model, made without memory on all of four ranks, don't start as a whole model's do."""
    from torch.distributed.fsdp import fully_shard

    from mpsdk_torch import from_config
    from mpsdk_torch.delayed_param import DelayedParamIniter
    from mpsdk_torch.layout import lay_out
    from mpsdk_torch.topology import join
    from mpsdk_torch.transformer import Transformer

    join(place)
    try:
        layout = lay_out({"sharded_data_parallel": 2, "tensor_parallel": 2})
        whole = from_config(config, seed=3)
        with torch.device("meta"):
            model = Transformer(whole.spec, vocab_rows=VOCABULARY + VOCABULARY % 2, group=layout.tensor)
        fully_shard(model, mesh=layout.mesh["sdp"])
        model.apply(DelayedParamIniter(model, seed=3).get_param_init_fn())
        found = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        return _differing(model, found, dict(whole.named_parameters()))
    finally:
        dist.destroy_process_group()


def finetune(place: Place, name: str, how: str) -> Seen:
    """The published fine-tuning example: transformers' own model, whole on rank 0 and empty elsewhere, under FSDP."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from mpsdk_torch import delay_param_initialization, shard_model
    from mpsdk_torch.any_model import find_blocks
    from mpsdk_torch.delayed_param import DelayedParamIniter
    from mpsdk_torch.layout import lay_out
    from mpsdk_torch.topology import join

    join(place)
    try:
        layout = lay_out({"sharded_data_parallel": place.world_size})
        with nullcontext() if place.rank == 0 else delay_param_initialization():
            model = make_model(name)
        delayed = DelayedParamIniter(model) if place.rank else None
        checks = delayed.validate_params_and_buffers_inited() if delayed else nullcontext()
        with Memory(watch_peak=True) as memory:
            if how == "fsdp1":
                with syncing_on_cpu(), checks:
                    wrapped: Any = FullyShardedDataParallel(
                        model,
                        auto_wrap_policy=ModuleWrapPolicy({type(block) for _, block in find_blocks(model)}),
                        sync_module_states=True,
                        param_init_fn=delayed.get_param_init_fn() if delayed else None,
                        device_id=torch.device("cpu"),
                        use_orig_params=True,
                    )
            else:
                whole = {} if delayed else model.state_dict()
                wrapped = shard_model(model, layout.mesh["sdp"])
                with checks:
                    if delayed:
                        model.apply(delayed.get_param_init_fn())
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_model_state_dict(model, whole, options=options)
        reference = make_model(name)
        with torch.no_grad():
            found, expected = wrapped(make_ids()).logits, reference(make_ids()).logits
        with FullyShardedDataParallel.summon_full_params(wrapped) if how == "fsdp1" else nullcontext():
            tensors = {
                key.replace("_fsdp_wrapped_module.", ""): _full(tensor).detach().clone()
                for key, tensor in (*wrapped.named_parameters(), *wrapped.named_buffers())
            }
        wanted = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
        wrong = sorted(tensors.keys() ^ wanted.keys()) + [
            key for key in tensors.keys() & wanted.keys() if not torch.equal(tensors[key], wanted[key])
        ]
        elements = sum(parameter.numel() for parameter in reference.parameters())
        distance = float((found - expected).abs().max() / expected.abs().max())
        return Seen(wrong, distance, [], memory.peak // 4, elements)
    finally:
        dist.destroy_process_group()


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def start_sharded(place: Place, name: str) -> list[str]:
    """Which tensors of transformers' own model, made without memory on all ranks, don't start as an unsharded one's do."""
    from mpsdk_torch import delay_param_initialization, shard_model
    from mpsdk_torch.delayed_param import DelayedParamIniter
    from mpsdk_torch.layout import lay_out
    from mpsdk_torch.topology import join

    join(place)
    try:
        started: list[dict[str, Tensor]] = []
        for sharded in (True, False):
            with delay_param_initialization():
                model = make_model(name)
            if sharded:
                shard_model(model, lay_out({"sharded_data_parallel": place.world_size}).mesh["sdp"])
            torch.manual_seed(3)
            model.apply(DelayedParamIniter(model).get_param_init_fn())
            started.append({key: _full(parameter).detach() for key, parameter in model.named_parameters()})
        found, wanted = started
        return [key for key in wanted if not torch.equal(found[key], wanted[key])]
    finally:
        dist.destroy_process_group()
