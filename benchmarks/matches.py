"""Who is measured beside whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.arena import Entry

PP2: dict[str, Any] = {"pipeline": {"degree": 2, "microbatches": 4}, "data_parallel": 1}
ZB_H1 = PP2 | {"pipeline": PP2["pipeline"] | {"schedule": "zb-h1"}}
TP2: dict[str, Any] = {"tensor_parallel": 2, "data_parallel": 1}


@dataclass(frozen=True)
class Match:
    """Contenders that do the same, mpsdk first; `processes` of them, each with `threads`."""

    processes: int
    threads: int
    entries: tuple[Entry, ...]


def ours(name: str = "mpsdk", **distribution: Any) -> Entry:
    return Entry(name, "ours:plan", {"distribution": distribution})


def ours_tf(name: str = "mpsdk, TensorFlow", **distribution: Any) -> Entry:
    return Entry(name, "ours_tf:plan", {"distribution": distribution})


def _data_parallel(processes: int) -> Match:
    return Match(processes, 1, (ours(data_parallel=processes), Entry("DDP", "loops:ddp")))


def _sharded(processes: int) -> Match:
    peers = Entry("FSDP2 by hand", "loops:fsdp2"), Entry("Accelerate, FSDP2", "accelerated:fsdp2")
    return Match(processes, 1, (ours(sharded_data_parallel=processes), *peers))


def _tensorflow(processes: int, *peers: Entry, **distribution: Any) -> Match:
    """mpsdk's TensorFlow beside TensorFlow's own, and beside mpsdk's PyTorch under the same plan."""
    threads = 2 if processes == 1 else 1
    return Match(
        processes, threads, (ours_tf(**distribution), *peers, ours("mpsdk, PyTorch", **distribution))
    )


def _compiled(processes: int, *peers: Entry, **distribution: Any) -> Match:
    """mpsdk's TensorFlow with XLA beside TensorFlow's own with it, and beside itself without."""
    threads = 2 if processes == 1 else 1
    compiled = ours_tf("mpsdk, TensorFlow, XLA", compile=True, **distribution)
    return Match(processes, threads, (compiled, *peers, ours_tf(**distribution)))


MIRRORED = Entry("MultiWorkerMirroredStrategy", "mirrored:loop")
MATCHES: dict[str, Match] = {
    "single": Match(
        1,
        2,
        (
            ours(),
            Entry("transformers, AdamW", "loops:plain"),
            Entry("transformers, fused AdamW", "loops:plain_fused"),
        ),
    ),
    "dp-2": _data_parallel(2),
    "dp-4": _data_parallel(4),
    "sdp-2": _sharded(2),
    "sdp-4": _sharded(4),
    "pp-2": Match(
        2,
        1,
        (
            ours(**PP2),
            Entry("mpsdk, zb-h1", "ours:plan", {"distribution": ZB_H1}),
            Entry("Schedule1F1B, our layers", "schedules:same_layers", {"distribution": PP2}),
            Entry("Schedule1F1B, transformers", "schedules:transformers", {"distribution": PP2}),
        ),
    ),
    "tf-single": _tensorflow(
        1,
        Entry("Keras fit", "keras_fit:keras_layers"),
        Entry("Keras fit, our layers", "keras_fit:our_layers"),
    ),
    "tf-single-xla": _compiled(
        1,
        Entry("Keras fit, XLA", "keras_fit:keras_layers", {"compile": True}),
        Entry("Keras fit, our layers, XLA", "keras_fit:our_layers", {"compile": True}),
    ),
    "tf-dp-2": _tensorflow(2, MIRRORED, data_parallel=2),
    "tf-dp-2-xla": _compiled(
        2, Entry("MultiWorkerMirroredStrategy, XLA", "mirrored:loop", {"compile": True}), data_parallel=2
    ),
    "tf-dp-4": _tensorflow(4, MIRRORED, data_parallel=4),
    "tf-sdp-2": _tensorflow(2, sharded_data_parallel=2),
    "tf-tp-2": _tensorflow(2, **TP2),
    "tf-pp-2": _tensorflow(2, **PP2),
}
