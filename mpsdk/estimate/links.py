"""Seconds that a message takes, by where its ranks stand and what their links carry.

A collective among r ranks takes latency · hops, and its bytes on the wire (`Message.wire`) at the bandwidth of the slowest
link on the ring. Hops are log2 r, rounded up, of an all-gather or a reduce-scatter, as libraries route small messages,
and twice that of an all-reduce. A ring that has k of its ranks on each machine goes between machines over the links of
all k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpsdk.errors import ConfigError, Problem
from mpsdk.estimate.communication import Message
from mpsdk.estimate.devices import DeviceFigures, Link, Speeds
from mpsdk.topology import Topology

_HOPS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Links:
    """The links of `topology` on devices of `figures`, while `speeds` holds on each machine."""

    topology: Topology
    figures: DeviceFigures
    speeds: Speeds

    def seconds(self, message: Message) -> float:
        """Of all that `message` counts, one after another."""
        return message.count * self.seconds_of_one(message)

    def seconds_of_one(self, message: Message) -> float:
        members = math.prod(getattr(self.topology.degrees, axis) for axis in message.axes)
        here = self._on_one_machine(message.axes)
        measured = self._measured(message) if here == members else None
        wire = message.wire / message.count if message.count else 0.0
        if measured is not None:
            return measured.latency + wire / measured.bandwidth
        # Of a pipeline's line only two ranks speak to each other, and the slowest link counts.
        adapters = here if message.ranks == members else 1
        link = self.speeds.inside if here == members else self._between(adapters)
        if message.collective == "send":
            return link.latency + message.bytes / link.bandwidth
        hops = _HOPS[message.collective] * math.ceil(math.log2(message.ranks))
        return link.latency * hops + wire / link.bandwidth

    def _on_one_machine(self, axes: tuple[str, ...]) -> int:
        """How many ranks of a group along `axes` share a machine, as the group of rank 0 does."""
        return sum(rank < self.figures.ranks_per_node for rank in self.topology.group(0, axes))

    def _between(self, adapters: int) -> Link:
        between = self.figures.between
        if between is None:
            ranks = self.figures.ranks_per_node
            remedy = f"has no figures for links between machines, and the plan takes more than {ranks} ranks"
            raise ConfigError([Problem("device", self.figures.name, remedy)], where="the estimate")
        inside = self.speeds.inside.bandwidth if adapters > 1 else math.inf
        return Link(latency=between.latency, bandwidth=min(inside, adapters * between.bandwidth))

    def _measured(self, message: Message) -> Link | None:
        for row in self.speeds.collectives:
            if (row.collective, row.ranks) == (message.collective, message.ranks):
                return Link(latency=row.latency, bandwidth=row.bandwidth)
        return None
