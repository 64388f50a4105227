"""Figures of well-known devices: peaks from public datasheets, and what of them is assumed to be reached.

Peaks are dense, without structured sparsity, fp32 without TF32. Nothing here has been measured by this project; a file that
`benchmarks/device.py` writes is, and goes before it.

| figure | source |
|---|---|
| A100: 312 TFLOP/s bf16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s both ways | NVIDIA A100 datasheet |
| H100 SXM: 989 TFLOP/s bf16, 67 fp32, 3.35 TB/s, NVLink 900 GB/s | NVIDIA H100 datasheet |
| H200: as H100, 141 GB at 4.8 TB/s | NVIDIA H200 datasheet |
| memory in bytes: 81,920, 81,559 and 143,771 MiB | what the driver reports |
| links between machines: one 200 Gb/s (A100) or 400 Gb/s adapter a GPU | NVIDIA DGX A100 and DGX H100 datasheets |
| attention: 0.6 of peak on A100, 0.35 on H100 | FlashAttention-2 and -3 (arXiv:2307.08691, arXiv:2407.08608) |
| matrix products 0.75 and 0.62 of peak; memory and links 0.8 | assumed |
"""

from __future__ import annotations

from mpsdk.estimate.devices import DeviceFigures, Link, PrecisionMode, Rate, Rates, Speeds

_MIB = 2**20
_TERA, _GIGA = 1e12, 1e9

# What a product of this many FLOPs reaches of what the largest do: assumed, as eager PyTorch is slow on small matrices.
_SMALL = ((1e8, 0.1), (1e9, 0.4), (1e10, 0.8), (1e11, 1.0))
_MEMORY = 0.8
_LINK = 0.8


def _gpu(
    name: str,
    source: str,
    *,
    memory: int,
    half: float,
    single: float,
    bandwidth: float,
    matmul: float,
    attention: float,
    inside: float,
    between: float,
) -> DeviceFigures:
    peaks: dict[PrecisionMode, float] = {"fp32": single, "bf16": half, "fp16": half}
    products: dict[PrecisionMode, Rates] = {
        precision: tuple(Rate(flops, matmul * part * peak) for flops, part in _SMALL)
        for precision, peak in peaks.items()
    }
    fused: dict[PrecisionMode, Rates] = {
        precision: (Rate(1.0, attention * peak),) for precision, peak in peaks.items()
    }
    speeds = Speeds(
        ranks=8,
        matmul=products,
        attention=fused,
        memory_bandwidth=_MEMORY * bandwidth,
        update_bandwidth=_MEMORY * bandwidth,
        kernel_seconds=6e-6,
        inside=Link(latency=5e-6, bandwidth=_LINK * inside),
    )
    return DeviceFigures(
        name=name,
        kind="gpu",
        source=source,
        memory_bytes=memory,
        reserved=0.1,
        peak_flops=peaks,
        ranks_per_node=8,
        speeds=(speeds,),
        between=Link(latency=1e-5, bandwidth=_LINK * between),
    )


DATASHEETS: dict[str, DeviceFigures] = {
    "a100": _gpu(
        "a100",
        "A100 80GB SXM, NVIDIA's datasheet; parts of the peak assumed",
        memory=81920 * _MIB,
        half=312 * _TERA,
        single=19.5 * _TERA,
        bandwidth=2039 * _GIGA,
        matmul=0.75,
        attention=0.6,
        inside=300 * _GIGA,
        between=25 * _GIGA,
    ),
    "h100": _gpu(
        "h100",
        "H100 SXM 80GB, NVIDIA's datasheet; parts of the peak assumed",
        memory=81559 * _MIB,
        half=989 * _TERA,
        single=67 * _TERA,
        bandwidth=3350 * _GIGA,
        matmul=0.62,
        attention=0.35,
        inside=450 * _GIGA,
        between=50 * _GIGA,
    ),
    "h200": _gpu(
        "h200",
        "H200 SXM 141GB, NVIDIA's datasheet; parts of the peak assumed",
        memory=143771 * _MIB,
        half=989 * _TERA,
        single=67 * _TERA,
        bandwidth=4800 * _GIGA,
        matmul=0.62,
        attention=0.35,
        inside=450 * _GIGA,
        between=50 * _GIGA,
    ),
    # An example of what a laptop does, not of any one machine: measure yours.
    "laptop": DeviceFigures(
        name="laptop",
        kind="cpu",
        source="an example of two cores with AVX2, no particular machine; measure yours",
        memory_bytes=16 * 2**30,
        reserved=0.25,
        peak_flops={"fp32": 2e11, "bf16": 2e11},
        ranks_per_node=8,
        cores=2,
        speeds=tuple(
            Speeds(
                ranks=ranks,
                matmul={"fp32": (Rate(1e6, 2e10 * part), Rate(1e9, 1.4e11 * part)), "bf16": (Rate(1e6, 2e10 * part),)},
                attention={"fp32": (Rate(1e6, 4e10 * part),), "bf16": (Rate(1e6, 2e10 * part),)},
                memory_bandwidth=1.5e10 * part,
                update_bandwidth=1.5e10 * part,
                kernel_seconds=1e-5,
                inside=Link(latency=1e-4 * ranks, bandwidth=2e9 * part),
            )
            for ranks, part in ((1, 1.0), (2, 1 / 2), (4, 1 / 4), (8, 1 / 8))
        ),
        between=Link(latency=2e-4, bandwidth=1e8),
    ),
}  # fmt: skip
