"""The layouts in which every framework must give the single-process results: world size and distribution, by name."""

from __future__ import annotations

from itertools import product
from typing import Any

FAMILIES = ("gpt2", "llama")

INTERLEAVED = {"degree": 2, "microbatches": 2, "schedule": "interleaved", "virtual_stages": 2}
ZB_H1 = {"degree": 2, "microbatches": 4, "schedule": "zb-h1"}
ZB_V = {"degree": 2, "microbatches": 4, "schedule": "zb-v", "virtual_stages": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "sdp2-parameters": (2, {"sharded_data_parallel": 2}),
    "sdp2-gradients": (2, {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}),
    "sdp2-optimizer": (2, {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}),
    "dp2-sdp2": (4, {"sharded_data_parallel": 2}),
    "dp2-sdp2-gradients": (4, {"sharded_data_parallel": {"degree": 2, "level": "gradients"}}),
    "dp2-sdp2-optimizer": (4, {"sharded_data_parallel": {"degree": 2, "level": "optimizer"}}),
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2-no-sequence": (2, {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}),
    "tp4": (4, {"tensor_parallel": 4}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "pp2-gpipe": (2, {"pipeline": {"degree": 2, "microbatches": 4, "schedule": "gpipe"}}),
    "pp4": (4, {"pipeline": {"degree": 4, "microbatches": 8}}),
    "pp2-interleaved": (2, {"pipeline": INTERLEAVED}),
    "pp2-sdp2-interleaved": (4, {"pipeline": INTERLEAVED, "sharded_data_parallel": 2}),
    "pp2-tp2-interleaved": (4, {"pipeline": INTERLEAVED, "tensor_parallel": 2}),
    "pp2-zb-h1": (2, {"pipeline": ZB_H1}),
    "pp2-sdp2-zb-h1": (4, {"pipeline": ZB_H1, "sharded_data_parallel": 2}),
    "pp2-sdp2-optimizer-zb-h1": (
        4,
        {"pipeline": ZB_H1, "sharded_data_parallel": {"degree": 2, "level": "optimizer"}},
    ),
    "pp2-dp2-zb-h1": (4, {"pipeline": ZB_H1}),
    "pp2-tp2-zb-h1": (4, {"pipeline": ZB_H1, "tensor_parallel": 2}),
    "pp4-zb-h1": (4, {"pipeline": ZB_H1 | {"degree": 4}}),
    "pp2-zb-v": (2, {"pipeline": ZB_V}),
    "pp2-sdp2-zb-v": (4, {"pipeline": ZB_V, "sharded_data_parallel": 2}),
    "pp2-tp2-zb-v": (4, {"pipeline": ZB_V, "tensor_parallel": 2}),
    "pp2-dp2": (4, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "pp2-dp2-tp2": (8, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "pp2-sdp2": (4, {"pipeline": {"degree": 2, "microbatches": 4}, "sharded_data_parallel": 2}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "sdp2-tp2": (4, {"sharded_data_parallel": 2, "tensor_parallel": 2}),
    "pp2-tp2-placed": (
        4,
        {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2, "placement": "tp,cp,sdp,dp,pp"},
    ),
    "pp2-sdp2-tp2": (
        8,
        {"pipeline": {"degree": 2, "microbatches": 2}, "sharded_data_parallel": 2, "tensor_parallel": 2},
    ),
}
SGD = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05, "weight_decay": 0.01, "accumulation": 1}
RECOMPUTE: dict[str, Any] = {
    "full": "full",
    "full-offload": {"mode": "full", "offload": True},
    "selective-attention": {"mode": "selective", "keep": ["attention"]},
    "selective-both": {"mode": "selective", "keep": ["attention", "matmul"]},
}
RECOMPUTED = [
    *product(FAMILIES, ["single", "sdp2-parameters", "pp2-tp2", "pp2-sdp2-tp2", "pp2-tp2-zb-h1", "pp2-sdp2-zb-v"]),
    ("gpt2", "pp2-sdp2-interleaved"), ("llama", "pp2-tp2-interleaved"),
    ("llama", "pp2-sdp2-zb-h1"), ("gpt2", "pp2-tp2-zb-v"),
]  # fmt: skip

DEEP: dict[str, tuple[int, dict[str, Any]]] = {
    f"pp4{extent and '-'}{extent}-{pipeline['schedule']}": (
        8 if extent else 4,
        {"pipeline": pipeline | {"degree": 4, "microbatches": 4 if extent else 8}, **more},
    )
    for pipeline in (INTERLEAVED, ZB_H1, ZB_V)
    for extent, more in {
        "": {},
        "sdp2": {"sharded_data_parallel": 2},
        "tp2": {"tensor_parallel": 2},
    }.items()
}

UNEVEN: dict[str, tuple[int, dict[str, Any]]] = {
    "sdp3-parameters": (3, {"sharded_data_parallel": 3}),
    "sdp3-gradients": (3, {"sharded_data_parallel": {"degree": 3, "level": "gradients"}}),
    "sdp3-optimizer": (3, {"sharded_data_parallel": {"degree": 3, "level": "optimizer"}}),
    "sdp3-tp2": (6, {"sharded_data_parallel": 3, "tensor_parallel": 2}),
    "pp2-sdp3": (6, {"sharded_data_parallel": 3, "pipeline": {"degree": 2, "microbatches": 4}}),
}
