"""A small channel with both ends for the tests of two-sided transports: two train ranks, any number of engine ranks.

Weights are small integers, exact in bfloat16, that tell the tensor and the version.
"""

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from transport import collective, stream
from transport.arena import Region
from transport.base import Landing, Link, Offers, Parameters, Publisher, Receiver, Transport
from transport.buckets import Inflow
from transport.layout import Box, Placement, Shard
from transport.packing import Packed
from transport.plan import Copy, plan_transfer

CPU = torch.device("cpu")
NUM_SOURCES = 2
BUFFER_BYTES = 768
"""Cuts embed, which has 1536 bytes on each train rank: there are four buckets from each, the first with 672 bytes of
it and a receipt from byte 704 on."""

PARAMETERS: Parameters = {
    "embed": ((64, 24), "bfloat16"),
    "qk": ((40, 24), "bfloat16"),
    "norm": ((24,), "float32"),
}
TENSORS = {
    "embed": ("embed", 0, (64, 24)),
    "q": ("qk", 0, (24, 24)),
    "k": ("qk", 24, (16, 24)),
    "norm": ("norm", 0, (24,)),
}
"""Trainer's tensor -> (engine's parameter, first row there, shape)."""

TRANSPORTS: dict[str, Transport] = {"stream": stream.StreamTransport(), "collective": collective.CollectiveTransport()}


def weights(name: str, version: int) -> torch.Tensor:
    shape = TENSORS[name][2]
    first = 7 * list(TENSORS).index(name) + 31 * version
    return ((torch.arange(torch.Size(shape).numel()) + first) % 251).reshape(shape).float()


def engine_weights(version: int) -> dict[str, torch.Tensor]:
    """What an engine that has the version holds."""
    expected = {}
    for parameter, (shape, dtype) in PARAMETERS.items():
        rows = [weights(name, version) for name, (home, _, _) in TENSORS.items() if home == parameter]
        expected[parameter] = torch.cat(rows).reshape(shape).to(getattr(torch, dtype))
    return expected


def copies() -> dict[int, list[Copy]]:
    held, wanted = [], []
    for name, (parameter, row, shape) in TENSORS.items():
        origin, rows = (0,) * len(shape), shape[0] // NUM_SOURCES
        shards = tuple(
            Shard(rank, Box((rank * rows, *origin[1:]), (rows, *shape[1:])), origin) for rank in range(NUM_SOURCES)
        )
        held.append(Placement(name, shape, name, "float32", shards))
        place = Shard(0, Box(origin, shape), (row, *origin[1:]))
        wanted.append(Placement(name, shape, parameter, PARAMETERS[parameter][1], (place,)))
    plan = plan_transfer(held, wanted)
    return {rank: list(plan.copies(rank, 0)) for rank in range(NUM_SOURCES)}


@dataclass(slots=True)
class Sources:
    """The train ranks' end: a publisher each, and what they hold."""

    transport: str
    link: Link
    regions: dict[int, Region]
    publishers: dict[int, Publisher]
    shards: dict[int, dict[str, torch.Tensor]]
    offers: Offers

    def publish(self, version: int, verify: bool = True) -> "list[Future[Packed]]":
        """Every train rank publishes new weights, at the same time."""
        for rank, own in self.shards.items():
            for name, shard in own.items():
                shard.copy_(weights(name, version)[rank * len(shard) : (rank + 1) * len(shard)])
        threads = ThreadPoolExecutor(len(self.publishers))
        futures = [threads.submit(publisher.publish, version, verify) for publisher in self.publishers.values()]
        threads.shutdown(wait=False)
        return futures

    def receiver(self, rank: int, turns: bool = True) -> Receiver:
        return connect_receiver(
            self.transport, replace(self.link, receiver_rank=rank), self.regions, self.offers, turns
        )

    def close(self) -> None:
        for publisher in self.publishers.values():
            publisher.close()


def open_sources(transport: str, receiver_ranks: Iterable[int], timeout_s: float, name: str = "test-0") -> Sources:
    link = Link(name, tuple(range(NUM_SOURCES)), tuple(receiver_ranks), timeout_s)
    regions = TRANSPORTS[transport].arrange(PARAMETERS, copies())
    shards = {
        rank: {name: torch.zeros(shape[0] // NUM_SOURCES, *shape[1:]) for name, (_, _, shape) in TENSORS.items()}
        for rank in regions
    }
    publishers = {
        rank: TRANSPORTS[transport].publisher(link, region, shards[rank], CPU) for rank, region in regions.items()
    }
    offers = {rank: publisher.offer() for rank, publisher in publishers.items()}
    for publisher in publishers.values():
        publisher.attach(offers)
    return Sources(transport, link, regions, publishers, shards, offers)


def connect_receiver(
    transport: str, link: Link, regions: dict[int, Region], offers: Offers, turns: bool = True
) -> Receiver:
    return TRANSPORTS[transport].receiver(link, regions, Landing(PARAMETERS, CPU, turns), offers)


def has(receiver: Receiver, version: int) -> bool:
    """Whether the receiver holds the version, whole. Raises VerificationError where it knows that it does not."""
    receiver.check(version)
    image = receiver.image(version)
    assert image is not None
    views = Landing(PARAMETERS, CPU, True).parameters_in(image)
    return all(torch.equal(views[name], tensor) for name, tensor in engine_weights(version).items())


def stage_all(receivers: Iterable[Receiver], version: int) -> "list[Future[Any]]":
    """Every receiver stages, at the same time."""
    listed = list(receivers)
    threads = ThreadPoolExecutor(len(listed))
    futures = [threads.submit(receiver.stage, version, {}) for receiver in listed]
    threads.shutdown(wait=False)
    return futures


# What a receiver in a process of its own does (see children.py).


def connect(state: dict[str, Any], transport: str, link: Link, regions: dict[int, Region], offers: Offers) -> int:
    state["receiver"] = connect_receiver(transport, link, regions, offers)
    return os.getpid()


def signal_itself(state: dict[str, Any], number: int, version: int, bucket: int) -> None:
    """Once, when it is about to load that bucket of that version."""
    load, done = Inflow.load, threading.Lock()

    def signal_and_load(inflow: Inflow, index: int, of: int, seal: bytes | None) -> float:
        if (of, index) == (version, bucket) and done.acquire(blocking=False):
            os.kill(os.getpid(), number)
        return load(inflow, index, of, seal)

    Inflow.load = signal_and_load  # type: ignore[method-assign]


def stage(state: dict[str, Any], version: int) -> str:
    """Returns "staged", or what went wrong."""
    try:
        state["receiver"].stage(version, {})
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "staged" if has(state["receiver"], version) else "staged other weights"
