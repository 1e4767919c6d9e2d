"""Weights through Ray's object store: slow and obvious, the oracle of every other transport."""

import time
from collections.abc import Mapping
from dataclasses import replace

import ray
import torch

from transport.arena import Region, allocate, run
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.packing import Packed, Packer, Unpacker


class ObjectStoreTransport:
    one_sided = True

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        return {rank: run(rank, own) for rank, own in copies.items()}

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "ObjectStorePublisher":
        return ObjectStorePublisher(region, sources, device)

    def receiver(
        self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers
    ) -> "ObjectStoreReceiver":
        return ObjectStoreReceiver(regions, landing.device)


class ObjectStorePublisher:
    """One buffer is enough: every version is a copy of its own in the store."""

    def __init__(self, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._flat = allocate(region.num_bytes, device)
        self._packer = Packer(region, self._flat, sources)

    def offer(self) -> None: ...

    def attach(self, offers: Offers) -> None: ...

    def publish(self, version: int, verify: bool) -> Packed:
        packed = self._packer.write(version, verify)
        return replace(packed, reference=ray.put(self._flat.cpu().numpy()))

    def close(self) -> None: ...


class ObjectStoreReceiver:
    def __init__(self, regions: dict[int, Region], device: torch.device) -> None:
        self._unpackers = {
            rank: Unpacker(region, allocate(region.num_bytes, device)) for rank, region in regions.items()
        }

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        pull_s = verify_s = 0.0
        for rank, unpacker in self._unpackers.items():
            start = time.perf_counter()
            unpacker.flat.copy_(torch.from_numpy(ray.get(packed[rank].reference).copy()))
            pulled = time.perf_counter()
            unpacker.check(version, packed[rank].seal)
            pull_s, verify_s = pull_s + pulled - start, verify_s + time.perf_counter() - pulled
        return Landed(pull_s, verify_s)

    def check(self, version: int) -> None:
        for unpacker in self._unpackers.values():
            unpacker.check(version, None)

    def image(self, version: int) -> None:
        return None

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return {rank: unpacker.views for rank, unpacker in self._unpackers.items()}

    def close(self) -> None: ...
