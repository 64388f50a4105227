"""What a pool's workers run: models that mpsdk has no family for, cut by their own plan, beside the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpsdk.backend import Place
from tests.cases import BOUND
from tests.torch.memory import Memory
from tests.torch.spreading import syncing_on_cpu

VOCABULARY = 62
USUAL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 4, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "arcee": USUAL,
    "cohere": USUAL,  # parallel residual, tied, logits scaled
    "cohere2": USUAL | {"sliding_window": 4, "head_dim": 4},
    "exaone4": USUAL | {"sliding_window": 4},  # norms of heads
    "gemma": USUAL | {"head_dim": 4},
    "gemma2": USUAL | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4},  # scaled embedding, tied
    "gemma3_text": USUAL | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4},
    "glm": USUAL | {"head_dim": 4},  # gate and up in one matrix
    "glm4": USUAL | {"head_dim": 4},
    "granite": USUAL | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "helium": USUAL | {"head_dim": 4},
    "ministral": USUAL | {"head_dim": 4},
    "nemotron": USUAL,
    "olmo2": USUAL,  # norms over all heads together
    "phi": USUAL,  # a bias on the output projection
    "phi3": USUAL,  # query, key and value in one matrix
    "seed_oss": USUAL | {"head_dim": 4},
    "smollm3": USUAL,
    "starcoder2": USUAL | {"use_bias": True},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": USUAL,  # an activation with parameters, which its plan leaves out
    "mixtral": USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


class Compared(NamedTuple):
    """What a rank's model did beside the whole one."""

    loss: float
    expected_loss: float
    wrong: list[str]  # gradients that are not this rank's share of the whole model's
    share: float  # of the whole model's elements
    tied: bool
    peak: float = 0.0  # the most that it held while it got its weights, by the whole model's elements


def make_model(architecture: str, **settings: Any) -> Any:
    """The same weights wherever it is called; norms and biases are random too."""
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(
        architecture, **(ARCHITECTURES | OTHERS)[architecture], **settings
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")  # of ones, or of zeros where 1 is added
            noise = torch.randn(parameter.shape).to(parameter.device) * 0.1
            parameter.copy_(parameter + noise if norm else noise)


def make_ids(rows: int = 2) -> Tensor:
    return (torch.arange(rows * 9).reshape(rows, 9) * 7 + 3) % (VOCABULARY - 2) + 2


def share_of(whole: Tensor, shape: torch.Size, rank: int, size: int) -> Tensor:
    """The part of `whole` that is of this shape."""
    for dimension, (part, all_of_it) in enumerate(zip(shape, whole.shape, strict=True)):
        if part != all_of_it:
            return whole.chunk(size, dimension)[rank]
    return whole


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wrong_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], rank: int = 0, size: int = 1
) -> list[str]:
    """Which gradients are not this rank's share of the whole model's."""
    floor = 1e-9 * max(float(gradient.abs().max()) for gradient in expected.values())
    wrong = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        wanted, largest = share_of(expected[name], found[name].shape, rank, size), expected[name].abs().max()
        if not float((found[name] - wanted).abs().max()) <= BOUND * float(largest) + floor:
            wrong.append(name)
    return wrong


def compare(
    place: Place,
    architecture: str,
    settings: dict[str, Any],
    plan: dict[str, str | None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Compared:
    """A loss and its gradients with tensor parallelism over all ranks; gradients of two passes add up."""
    from mpsdk_torch import parallelize_model
    from mpsdk_torch.topology import join

    join(place)
    try:
        reference, model = (make_model(architecture, **settings).to(dtype) for _ in range(2))
        assert parallelize_model(model, {"tensor_parallel": place.world_size}, plan=plan) is model
        ids = make_ids()
        for _ in range(2):
            expected = reference(ids, labels=ids).loss
            expected.backward()
            found = model(ids, labels=ids).loss
            found.backward()
        elements, whole = (sum(p.numel() for p in m.parameters()) for m in (model, reference))
        wrong = wrong_gradients(gradients_of(model), gradients_of(reference), place.rank, place.world_size)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return Compared(found.item(), expected.item(), wrong, elements / whole, tied)
    finally:
        dist.destroy_process_group()


def compare_sharded(place: Place, architecture: str, how: str) -> Compared:
    """The same of weights that rank 0 alone had, cut over two ranks and sharded over two by FSDP1 or FSDP2."""
    from mpsdk_torch import delay_param_initialization, parallelize_model
    from mpsdk_torch.layout import current
    from mpsdk_torch.topology import join

    join(place)
    try:
        reference = make_model(architecture)
        with nullcontext() if place.rank == 0 else delay_param_initialization():
            model = make_model(architecture)
        config = {"tensor_parallel": 2, "sharded_data_parallel": 2}
        with Memory(watch_peak=True) as memory:
            parallelize_model(model, config, load_state_dict_from_rank0=True)
            layout = current()
            wrapped = SPREAD[how](model, layout)
        ids = make_ids()
        expected = reference(ids, labels=ids).loss
        expected.backward()
        found = wrapped(ids, labels=ids).loss
        found.backward()
        with whole_gradients(wrapped, how) as gradients:
            wrong = wrong_gradients(gradients, gradients_of(reference), layout.coordinates.tp, 2)
            elements = sum(parameter.numel() for parameter in reference.parameters())
            share = sum(gradient.numel() for gradient in gradients.values()) / elements
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return Compared(found.item(), expected.item(), wrong, share, tied, memory.peak / 4 / elements)
    finally:
        dist.destroy_process_group()


def _with_fsdp1(model: nn.Module, layout: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from mpsdk_torch.any_model import find_blocks
    from mpsdk_torch.delayed_param import DelayedParamIniter

    delayed = DelayedParamIniter(model) if next(model.parameters()).is_meta else None
    with syncing_on_cpu(), delayed.validate_params_and_buffers_inited() if delayed else nullcontext():
        return FullyShardedDataParallel(
            model,
            process_group=layout.mesh["sdp"].get_group(),
            auto_wrap_policy=ModuleWrapPolicy({type(block) for _, block in find_blocks(model)}),
            sync_module_states=True,
            param_init_fn=delayed.get_param_init_fn() if delayed else None,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )


def _with_fsdp2(model: nn.Module, layout: Any) -> nn.Module:
    from mpsdk_torch import shard_model
    from mpsdk_torch.delayed_param import DelayedParamIniter, load_from_first

    delayed = DelayedParamIniter(model) if next(model.parameters()).is_meta else None
    weights = {} if delayed else model.state_dict()
    shard_model(model, layout.mesh["sdp"])
    if delayed:
        model.apply(delayed.get_param_init_fn())
    load_from_first(model, weights)
    return model


SPREAD = {"fsdp1": _with_fsdp1, "fsdp2": _with_fsdp2}


@contextmanager
def whole_gradients(model: Any, how: str) -> Iterator[dict[str, Tensor]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if how == "fsdp2":
        yield {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        return
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        yield {
            name.replace("_fsdp_wrapped_module.", ""): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }


class Mixer(nn.Module):
    """A module of one's own: what `scale` is and what comes back differ from its twin's."""

    def __init__(self, width: int, inner: int = 8, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"mixed": self.down(torch.tanh(self.up(hidden)) * scale)}


class Model(nn.Module):
    """Odd inside and out: an embedding, mixers in a list, a tied output."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width, padding_idx=3)
        self.stem = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.mixers = nn.ModuleList(Mixer(width, 12, bias=block != 1) for block in range(blocks))
        self.side = nn.Linear(width, 5)  # out_features is odd
        self.output = nn.Linear(width, VOCABULARY, bias=False)
        self.output.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.stem(self.tokens(ids))
        for mixer in self.mixers:
            hidden = hidden + mixer(hidden, scale=0.5)["mixed"]
        return self.output(hidden).square().mean() + self.side(hidden).square().mean()


def make_parallel_mixer() -> type[nn.Module]:
    from mpsdk_torch.comm import enter_parallel
    from mpsdk_torch.layout import tensor_group
    from mpsdk_torch.nn import DistributedLinear

    class ParallelMixer(nn.Module):
        def __init__(self, sizes: tuple[int, int], with_bias: bool) -> None:
            super().__init__()
            width, inner = sizes
            self.group = tensor_group()
            self.up = DistributedLinear(width, inner, cut="column", bias=with_bias, group=self.group)
            self.down = DistributedLinear(inner, width, cut="row", bias=False, group=self.group)

        def forward(self, scale: float, hidden: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(enter_parallel(hidden, self.group))) * scale)

    return ParallelMixer


def compare_twins(place: Place, marking: str) -> Compared:
    """A model of one's own with twins for its mixers ("twins"), by layers alone ("layers"), or by a plan ("plan")."""
    from mpsdk_torch import parallelize_model, register, tensor_parallelism
    from mpsdk_torch.topology import join

    join(place)
    try:
        if marking == "twins" and Mixer not in register._twins:
            register.tp_register_with_module(
                Mixer,
                make_parallel_mixer(),
                init_hook=lambda width, inner=8, *, bias=True: (((width, inner),), {"with_bias": bias}),
                forward_hook=lambda hidden, scale=1.0: ((scale,), {"hidden": hidden}),
                return_hook=lambda mixed: {"mixed": mixed},
            )
        torch.manual_seed(2)
        reference = Model()
        with tensor_parallelism(marking != "plan"):
            model = Model()
            with tensor_parallelism(False):
                model.side = nn.Linear(8, 5)
        model.load_state_dict(reference.state_dict())
        plan = {"mixers.*.up": "colwise", "mixers.*.down": "rowwise", "output": "colwise_gather_output"}
        layout = {"tensor_parallel": place.world_size}
        parallelize_model(model, layout, plan=plan if marking == "plan" else None)
        expected, found = reference(make_ids()), model(make_ids())
        expected.backward()
        found.backward()
        wrong = wrong_gradients(gradients_of(model), gradients_of(reference), place.rank, place.world_size)
        elements, whole = (sum(p.numel() for p in m.parameters()) for m in (model, reference))
        tied = model.output.weight is model.tokens.weight
        return Compared(found.item(), expected.item(), wrong, elements / whole, tied)
    finally:
        dist.destroy_process_group()


def compare_any_sharded(place: Place) -> Compared:
    """The same model by FSDP2, its blocks found by themselves."""
    from torch.distributed.fsdp import FSDPModule

    from mpsdk_torch import shard_model
    from mpsdk_torch.layout import lay_out
    from mpsdk_torch.topology import join

    join(place)
    try:
        torch.manual_seed(2)
        reference, model = Model(), Model()
        model.load_state_dict(reference.state_dict())
        shard_model(model, lay_out({"sharded_data_parallel": place.world_size}).mesh["sdp"])
        assert [name for name, m in model.named_modules() if isinstance(m, FSDPModule)] == [
            "", "mixers.0", "mixers.1", "mixers.2"
        ]  # fmt: skip
        expected, found = reference(make_ids()), model(make_ids())
        expected.backward()
        found.backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        held = sum(p.to_local().numel() for p in model.parameters())
        wrong = wrong_gradients(gradients, gradients_of(reference))
        share = held / sum(p.numel() for p in reference.parameters())
        return Compared(
            found.item(), expected.item(), wrong, share, model.output.weight is model.tokens.weight
        )
    finally:
        dist.destroy_process_group()


def compare_stages(place: Place, architecture: str) -> Compared:
    """A model in as many pipeline stages as ranks, run by torch's own 1F1B schedule."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    from mpsdk_torch.stages import pipeline_stage, tied_weight
    from mpsdk_torch.topology import join

    join(place)
    try:
        reference, model = make_model(architecture).train(), make_model(architecture).train()
        blocks, ranks = 4, place.world_size
        stage = pipeline_stage(model, place.rank * blocks // ranks, (place.rank + 1) * blocks // ranks)
        ids = make_ids(rows=4)

        def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        expected = loss_of(reference(ids, use_cache=False).logits, ids)
        expected.backward()
        runs = PipelineStage(stage, place.rank, ranks, torch.device("cpu"))
        schedule = Schedule1F1B(runs, n_microbatches=4, loss_fn=loss_of)
        losses: list[Tensor] = []
        given = (ids,) if place.rank == 0 else ()
        schedule.step(*given, target=ids, losses=losses)
        tied = tied_weight(stage)
        ends = dist.new_group([0, ranks - 1])
        if tied is not None:
            dist.all_reduce(tied.grad, group=ends)
        gradients = {
            name.removeprefix(
                "model.",
            ): g
            for name, g in gradients_of(stage).items()
        }
        whole = gradients_of(reference)
        if tied is not None and place.rank:
            gradients["model.embed_tokens.weight"] = gradients.pop("lm_head.weight")
        wrong = wrong_gradients(gradients, {name: g for name, g in whole.items() if name in gradients})
        found = torch.stack(losses).mean().item() if losses else expected.item()
        share = sum(g.numel() for g in gradients.values()) / sum(g.numel() for g in whole.values())
        return Compared(found, expected.item(), wrong, share, tied is not None)
    finally:
        dist.destroy_process_group()
