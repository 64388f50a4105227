"""All measurements: `benchmarks.peers`, then `benchmarks.scaling`. Parts: `python -m benchmarks.peers --help`, and so on."""

from __future__ import annotations

import sys

from benchmarks import peers, scaling

if len(sys.argv) > 1:
    raise SystemExit(f"python -m benchmarks takes no arguments, and got {' '.join(sys.argv[1:])}")
peers.main([])
scaling.main([])
