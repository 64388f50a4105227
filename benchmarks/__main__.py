"""All measurements: `benchmarks.peers`, then `benchmarks.scaling`."""

from __future__ import annotations

from benchmarks import peers, scaling

peers.main([])
scaling.main()
