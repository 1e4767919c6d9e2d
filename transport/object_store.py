"""Weights through Ray's object store: slow and obvious, the oracle of every other transport."""

from typing import Any

import ray
import torch

from transport.arena import Arena


class ObjectStoreTransport:
    def publisher(self, arena: Arena) -> "ObjectStorePublisher":
        return ObjectStorePublisher(arena)

    def receiver(self, arenas: list[Arena]) -> "ObjectStoreReceiver":
        return ObjectStoreReceiver(arenas)


class ObjectStorePublisher:
    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def publish(self) -> list[Any]:
        return [ray.put(self._arena.flat.cpu().numpy())]

    def close(self) -> None: ...


class ObjectStoreReceiver:
    def __init__(self, arenas: list[Arena]) -> None:
        self._arenas = arenas

    def pull(self, rank: int, handle: list[Any]) -> None:
        self._arenas[rank].flat.copy_(torch.from_numpy(ray.get(handle[0]).copy()))

    def close(self) -> None:
        self._arenas = []
