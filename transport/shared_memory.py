"""Weights of one host in memory that everybody maps: the train ranks' cast is the only copy there is.

The channel's first train rank owns two images (one per half); the other train ranks map them and write their own pieces
beside its. Engines get them as RDT objects of a transport of our own, read-only, any number of engines the same pages,
and turn their parameters to the half that holds the version. The first publish seals the images.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)

from transport.arena import Region, image
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.memfd import Handle, SharedBuffer, open_buffer
from transport.packing import Packed, Packer, Unpacker

NUM_HALVES = 2
NAME = "RAYFIT_SHARED_MEMORY"


class SharedMemoryTransport:
    one_sided = True

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        return image(parameters, copies)

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "SharedMemoryPublisher":
        return SharedMemoryPublisher(link, region, sources)

    def receiver(
        self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers
    ) -> "SharedMemoryReceiver":
        return SharedMemoryReceiver(regions, offers)


@dataclass(frozen=True, slots=True)
class SharedImages:
    """The owner's two images: where other train ranks map them for writing, and the RDT references that engines get."""

    handles: list[Handle]
    boxes: list[list[Any]]


class SharedMemoryPublisher:
    def __init__(self, link: Link, region: Region, sources: Mapping[str, torch.Tensor]) -> None:
        register_shared_memory()
        self._region, self._sources = region, sources
        self._is_owner = region.source_rank == min(link.source_ranks)
        self._buffers: list[SharedBuffer] = []
        self._boxes: list[list[Any]] = []
        self._packers: list[Packer] = []
        if self._is_owner:
            self._buffers = [SharedBuffer(region.num_bytes) for _ in range(NUM_HALVES)]
            for buffer in self._buffers:
                _HANDLES[buffer.flat.data_ptr()] = buffer.handle
            self._boxes = [[ray.put([buffer.flat], _tensor_transport=NAME)] for buffer in self._buffers]

    def offer(self) -> SharedImages | None:
        return SharedImages([buffer.handle for buffer in self._buffers], self._boxes) if self._is_owner else None

    def attach(self, offers: Offers) -> None:
        images = next(offer for offer in offers.values() if offer is not None)
        flats = [buffer.flat for buffer in self._buffers] or [
            open_buffer(handle, writable=True) for handle in images.handles
        ]
        self._packers = [Packer(self._region, flat, self._sources) for flat in flats]

    def publish(self, version: int, verify: bool) -> Packed:
        for buffer in self._buffers:  # every train rank has mapped them
            buffer.seal()
        return self._packers[version % NUM_HALVES].write(version, verify)

    def close(self) -> None:
        self._boxes, self._packers = [], []
        for buffer in self._buffers:
            buffer.close()


class SharedMemoryReceiver:
    def __init__(self, regions: dict[int, Region], offers: Offers) -> None:
        register_shared_memory()
        images = next(offer for offer in offers.values() if offer is not None)
        self._flats = [ray.get(box[0])[0] for box in images.boxes]
        self._unpackers = [{rank: Unpacker(region, flat) for rank, region in regions.items()} for flat in self._flats]

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        start = time.perf_counter()
        for rank, unpacker in self._at(version).items():
            unpacker.check(version, packed[rank].seal)
        return Landed(0.0, time.perf_counter() - start)

    def check(self, version: int) -> None:
        for unpacker in self._at(version).values():
            unpacker.check(version, None)

    def image(self, version: int) -> torch.Tensor:
        return self._flats[version % NUM_HALVES]

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return {rank: unpacker.views for rank, unpacker in self._at(version).items()}

    def close(self) -> None: ...

    def _at(self, version: int) -> dict[int, Unpacker]:
        return self._unpackers[version % NUM_HALVES]


_HANDLES: dict[int, Handle] = {}
"""Data pointer of each image that this process owns -> where others open it."""


@dataclass
class SharedMetadata(TensorTransportMetadata):
    handles: list[Handle] | None = None


class SharedMemoryManager(TensorTransportManager):
    """Ray's side of the transport: an object is a list of handles, receiving it is mapping them read-only."""

    def tensor_transport_backend(self) -> str:
        return NAME

    @staticmethod
    def is_one_sided() -> bool:
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        return True  # else Ray kills both actors on an error

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> SharedMetadata:
        meta = [(tensor.shape, tensor.dtype) for tensor in rdt_object]
        return SharedMetadata(meta, "cpu", [_HANDLES[tensor.data_ptr()] for tensor in rdt_object])

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self, obj_id: str, tensor_transport_metadata: Any, communicator_metadata: Any, target_buffers: Any = None
    ) -> list[torch.Tensor]:
        return [open_buffer(handle, writable=False) for handle in tensor_transport_metadata.handles]

    def send_multiple_tensors(self, *arguments: Any) -> None:
        raise NotImplementedError("one-sided: receivers map the memory themselves")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None: ...

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None: ...


def register_shared_memory() -> None:
    """Make the transport known to Ray; in every process that puts or gets such an object."""
    with contextlib.suppress(ValueError):  # known already
        register_tensor_transport(NAME, ["cpu"], SharedMemoryManager, torch.Tensor)
