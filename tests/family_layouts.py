"""The layouts in which every family and head is trained: one of each kind of parallelism, and mixes."""

from __future__ import annotations

from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline": {"degree": 2, "microbatches": 4}}),
    "tp2-no-sequence": (2, {"tensor_parallel": {"degree": 2, "sequence_parallel": False}}),
    "pp2-tp2": (4, {"pipeline": {"degree": 2, "microbatches": 2}, "tensor_parallel": 2}),
    "sdp2": (2, {"sharded_data_parallel": 2}),
    "pp2-tp2-zb-h1-recomputed": (
        4,
        {
            "pipeline": {"degree": 2, "microbatches": 4, "schedule": "zb-h1"},
            "tensor_parallel": 2,
            "activation_checkpointing": "full",
        },
    ),
}
