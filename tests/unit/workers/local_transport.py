"""A one-sided transport within one process, with the real packing and receipts, and an engine that only holds weights:
for tests of what stands on transports."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from transport.arena import Region, allocate, image, run
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.names import EngineParameter
from transport.packing import Packed, Packer, Unpacker

NUM_HALVES = 2


@dataclass(frozen=True, slots=True)
class LocalTransport:
    """`lands`: versions are copied to the receiver's own memory; else receivers read the publishers' halves, in which
    all train ranks write side by side. If it says that it is not `one_sided`, it is only called as if it were."""

    lands: bool = False
    one_sided: bool = True

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        if self.lands:
            return {rank: run(rank, own) for rank, own in copies.items()}
        return image(parameters, copies)

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "LocalPublisher":
        is_owner = self.lands or region.source_rank == min(link.source_ranks)
        return LocalPublisher(region, sources, is_owner)

    def receiver(self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers) -> "LocalReceiver":
        return LocalReceiver(self.lands, regions, landing, offers)


class LocalPublisher:
    def __init__(self, region: Region, sources: Mapping[str, torch.Tensor], is_owner: bool) -> None:
        self.region, self.sources, self.is_closed = region, sources, False
        self.flats = [allocate(region.num_bytes, torch.device("cpu")) for _ in range(NUM_HALVES if is_owner else 0)]

    def offer(self) -> list[torch.Tensor]:
        return self.flats

    def attach(self, offers: Offers) -> None:
        self.flats = self.flats or next(flats for flats in offers.values() if flats)
        self._packers = [Packer(self.region, flat, self.sources) for flat in self.flats]

    def publish(self, version: int, verify: bool) -> Packed:
        return self._packers[version % NUM_HALVES].write(version, verify)

    def close(self) -> None:
        self.is_closed = True


class LocalReceiver:
    """`stage` waits for `go_on`, once it has set `entered`."""

    def __init__(self, lands: bool, regions: dict[int, Region], landing: Landing, offers: Offers) -> None:
        self._lands, self._offers, self.is_closed = lands, offers, False
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        shared = [] if lands else next(flats for flats in offers.values() if flats)
        self._shared = shared
        if lands:
            flats = {rank: allocate(region.num_bytes, landing.device) for rank, region in regions.items()}
            self._at = [{rank: Unpacker(region, flats[rank]) for rank, region in regions.items()}]
        else:
            self._at = [{rank: Unpacker(region, flat) for rank, region in regions.items()} for flat in shared]

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        self.entered.set()
        self.go_on.wait(20)
        for rank, unpacker in self._unpackers(version).items():
            if self._lands:
                unpacker.flat.copy_(self._offers[rank][version % NUM_HALVES])
            unpacker.check(version, packed[rank].seal if packed else None)
        return Landed(0.25, 0.5)

    def check(self, version: int) -> None:
        for unpacker in self._unpackers(version).values():
            unpacker.check(version, None)

    def image(self, version: int) -> torch.Tensor | None:
        return None if self._lands else self._shared[version % NUM_HALVES]

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return {rank: unpacker.views for rank, unpacker in self._unpackers(version).items()}

    def close(self) -> None:
        self.is_closed = True

    def _unpackers(self, version: int) -> dict[int, Unpacker]:
        return self._at[version % len(self._at)]


class HoldingEngine:
    """An engine that holds weights and nothing else; it serves what `parameters` has."""

    packed_modules_mapping: Mapping[str, list[str]] = {"qk": ["q", "k"]}

    def __init__(self, shapes: Parameters, turns: bool) -> None:
        self.turns = turns
        self.weight_version = 0
        self._parameters = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()
        }
        self._described = {name: EngineParameter(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def parameters(self) -> Mapping[str, torch.Tensor]:
        return self._parameters

    def describe_parameters(self) -> dict[str, EngineParameter]:
        return self._described

    def turn(self, parameters: Mapping[str, torch.Tensor]) -> None:
        assert self.turns and parameters.keys() == self._parameters.keys()
        self._parameters = dict(parameters)

    def weights_written(self, weight_version: int) -> None:
        self.weight_version = weight_version

    def serves(self) -> dict[str, Any]:
        """The distinct values of each parameter."""
        return {name: tensor.unique().tolist() for name, tensor in self._parameters.items()}

    def has_unfinished_requests(self) -> bool:
        return False

    def step(self) -> list[Any]:
        return []

    def add_request(self, *arguments: Any) -> None:
        raise NotImplementedError

    def seed(self, seed: int) -> None: ...

    def close(self) -> None: ...
