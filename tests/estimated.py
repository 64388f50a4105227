"""What is asked of the estimate of every framework: layouts whose messages, elements and activations it must say exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mpsdk.estimate import estimate
from mpsdk.plan import Plan
from mpsdk.topology import AXES

Sent = Counter[tuple[str, tuple[int, ...], int]]  # collective, ranks, bytes of the payload
Case = tuple[str, int, dict[str, Any], dict[str, Any]]  # family, ranks, distribution, training and model

SEVERAL: dict[str, Any] = {"pipeline": {"microbatches": 2}}
TP2 = SEVERAL | {"tensor_parallel": 2}
TP2_WHOLE = SEVERAL | {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}
PP2: dict[str, Any] = {"pipeline": {"degree": 2, "microbatches": 4}}
PP3: dict[str, Any] = {"pipeline": {"degree": 3, "microbatches": 4, "partition": [1, 2, 1]}}
INTERLEAVED: dict[str, Any] = {
    "pipeline": {"degree": 2, "microbatches": 4, "schedule": "interleaved", "virtual_stages": 2}
}
ZB_H1: dict[str, Any] = {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-h1"}}
ZB_V: dict[str, Any] = {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-v", "virtual_stages": 2}}
SDP2 = {"sharded_data_parallel": 2}
SDP3 = {"sharded_data_parallel": 3}
GRADIENTS = {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}
OPTIMIZER = {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}
BF16 = {"precision": "bf16"}
FULL = {"activation_checkpointing": "full"}
OFFLOAD = {"activation_checkpointing": {"mode": "full", "offload": True}}
ATTENTION = {"activation_checkpointing": {"mode": "selective", "keep": ["attention"]}}
BOTH = {"activation_checkpointing": {"mode": "selective", "keep": ["attention", "matmul"]}}
UNTIED = {"model": {"tie_word_embeddings": False}}
DROPOUT = {"dropout": 0.1}
ONE_BACKWARD = {"accumulation": 1}
SGD = {"optimizer": "sgd", "momentum": 0.9}

MESSAGES: dict[str, Case] = {
    "single": ("gpt2", 1, SEVERAL, {}),
    "single-full": ("llama", 1, SEVERAL | FULL | BF16, {}),
    "single-attention": ("gpt2", 1, SEVERAL | ATTENTION, {}),
    "dp2": ("gpt2", 2, SEVERAL, {}),
    "dp2-bf16": ("llama", 2, SEVERAL | BF16, {}),
    "sdp2": ("gpt2", 2, SEVERAL | SDP2, {}),
    "sdp2-untied": ("llama", 2, SEVERAL | SDP2, UNTIED),
    "sdp2-untied-one-backward": ("llama", 2, SDP2, UNTIED | ONE_BACKWARD),
    "sdp3-uneven": ("gpt2", 3, SDP3 | BF16, {"global_batch": 24}),
    "sdp2-gradients": ("llama", 2, SEVERAL | GRADIENTS | BF16, {}),
    "sdp2-optimizer": ("gpt2", 2, SEVERAL | OPTIMIZER, {}),
    "dp2-sdp2": ("gpt2", 4, SEVERAL | SDP2, {}),
    "dp2-sdp2-gradients": ("llama", 4, SEVERAL | GRADIENTS, {}),
    "tp2": ("gpt2", 2, TP2, {}),
    "tp2-whole-sequence": ("llama", 2, TP2_WHOLE, {}),
    "tp2-full": ("gpt2", 2, TP2 | FULL, {}),
    "tp2-full-dropout": ("gpt2", 2, TP2 | FULL, DROPOUT),
    "tp2-offload": ("llama", 2, TP2 | OFFLOAD, {}),
    "tp2-both": ("llama", 2, TP2 | BOTH, {}),
    "tp2-whole-sequence-full": ("gpt2", 2, TP2_WHOLE | FULL, {}),
    "pp2": ("gpt2", 2, PP2, {}),
    "pp3": ("llama", 3, PP3 | BF16, {}),
    "interleaved": ("gpt2", 2, INTERLEAVED | FULL, {}),
    "zb-h1-full": ("llama", 2, ZB_H1 | FULL, UNTIED),
    "zb-v-tp2": ("gpt2", 4, ZB_V | {"tensor_parallel": 2}, {}),
    "pp2-sdp2": ("gpt2", 4, PP2 | SDP2, {}),
    "pp2-sdp2-one-pass": ("llama", 4, PP2 | SDP2, ONE_BACKWARD),
    "interleaved-sdp2": ("llama", 4, INTERLEAVED | SDP2, UNTIED),
    "pp2-tp2": ("llama", 4, PP2 | {"tensor_parallel": 2} | FULL, {}),
    "pp2-sdp2-tp2": ("gpt2", 8, PP2 | SDP2 | {"tensor_parallel": 2} | BF16, {}),
}

STATES: dict[str, Case] = {
    "single": ("gpt2", 1, SEVERAL, {}),
    "dp2": ("gpt2", 2, SEVERAL, {}),
    "sdp3-uneven": ("gpt2", 3, SEVERAL | SDP3, {"global_batch": 12}),
    "sdp3-uneven-bf16": ("llama", 3, SEVERAL | SDP3 | BF16, {"global_batch": 12}),
    "sdp2-gradients": ("llama", 2, SEVERAL | GRADIENTS, SGD),
    "sdp2-optimizer": ("gpt2", 2, SEVERAL | OPTIMIZER | BF16, {}),
    "tp2": ("llama", 2, TP2, {}),
    "pp3": ("gpt2", 3, PP3, {}),
    "interleaved": ("llama", 2, INTERLEAVED, {}),
    "zb-v": ("gpt2", 2, ZB_V, {}),
    "pp2-sdp2-tp2": ("gpt2", 8, PP2 | SDP2 | {"tensor_parallel": 2}, SGD),
}

MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": FULL,
    "offload": OFFLOAD,
    "attention": ATTENTION,
    "matmul": {"activation_checkpointing": {"mode": "selective", "keep": ["matmul"]}},
    "both": BOTH,
}
KEPT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, SEVERAL),
    "tp2": (2, TP2),
    "tp2-whole-sequence": (2, TP2_WHOLE),
    "pp3": (3, PP3),
}
FEW_MODES = ("none", "full", "both")
KEPT = [
    *(("gpt2", layout, mode, {}) for layout in KEPT_LAYOUTS for mode in MODES),
    *(("llama", layout, mode, {}) for layout in KEPT_LAYOUTS for mode in FEW_MODES),
    *(
        (family, layout, mode, BF16)
        for family in ("gpt2", "llama")
        for layout in ("single", "tp2")
        for mode in FEW_MODES
    ),
]


def expected_messages(plan: Plan, rank: int, every: str) -> Sent:
    """The messages that the estimate says `rank` sends."""
    sent: Sent = Counter()
    place = plan.topology.coordinates(rank)
    for message in estimate(plan, device="cpu").messages_of(rank).messages:
        if message.every != every:
            continue
        group = plan.topology.group(rank, message.axes)
        if message.purpose == "gradients of tied tensors":
            group = plan.tied_group(rank) or ()
        assert len(group) == message.ranks or message.collective == "send", (place, AXES, message)
        sent[message.collective, group, message.bytes] += message.count
    return sent
