"""Weights through two small buffers that both sides see, filled and loaded in turn; ZeroMQ carries only who may.

For workers of one host, colocated ones above all: besides the engine's images it takes two buffers per train rank and
channel, of shared memory on a CPU, of CUDA memory passed by IPC handle on a GPU. Two-sided: a publish lasts until the
receivers have loaded the version, and each side waits for the other no longer than the link allows.

    source:    fill 0 | fill 1 | wait: 0 loaded? | fill 2 (in buffer 0) | wait: 1 loaded? | ...
    receiver:          load 0  | load 1          |                      | load 2          | ...

The CUDA path has not been run yet.
"""

import contextlib
import itertools
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import zmq

from transport.arena import Region, image
from transport.audience import LOOK_S, Audience
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.buckets import NUM_BUFFERS, Inflow, LandedImages, buffer_bytes, cut
from transport.deadline import WHOLE_SHARE, Deadline
from transport.frames import FromReceiver, Left, Loaded, Missed, Ready, encode, from_source, open_socket
from transport.host import Owner
from transport.memfd import Handle, SharedBuffer, open_buffer
from transport.packing import Packed, Packer
from transport.receipt import digest
from transport.run_folder import make_run_folder, remove_run_folder

MAX_PATH_BYTES = 107
"""The longest path of a Unix socket."""


@dataclass(frozen=True, slots=True)
class CudaHandle:
    """What torch needs to map another process's CUDA memory, as UntypedStorage._share_cuda_ gives it."""

    device: int
    memory: bytes
    num_bytes: int
    offset_bytes: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync_required: bool


class CudaBuffer:
    """The owner's CUDA memory. Not yet run."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.handle = CudaHandle(*self.flat.untyped_storage()._share_cuda_())

    def close(self) -> None: ...


def open_cuda_buffer(handle: CudaHandle) -> torch.Tensor:
    """Map the owner's CUDA memory, as a flat uint8 tensor. Both processes must see the same GPU. Not yet run."""
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(
        handle.device, handle.memory, handle.num_bytes, handle.offset_bytes,
        handle.counter, handle.counter_offset, handle.event, handle.event_sync_required,
    )  # fmt: skip
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(frozen=True, slots=True)
class StreamOffer:
    """Where a source is: its process, its socket, and its buffers, each `num_bytes` long."""

    owner: Owner
    endpoint: str
    num_bytes: int
    buffers: list[Handle | CudaHandle]


class StreamTransport:
    one_sided = False

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        return image(parameters, copies)

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "StreamPublisher":
        return StreamPublisher(link, region, sources, device)

    def receiver(self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers) -> "StreamReceiver":
        return StreamReceiver(link, regions, landing, offers)


class StreamPublisher:
    def __init__(self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._num_bytes = buffer_bytes(device)
        self._folder = make_run_folder(f"{link.name}-rank{region.source_rank}")
        path = f"{self._folder}/socket"
        if len(path.encode()) > MAX_PATH_BYTES:
            remove_run_folder(self._folder)
            raise ValueError(f"{path} is too long a path for a socket: set TMPDIR to a shorter folder")
        self._endpoint = f"ipc://{path}"
        self._buffers: list[SharedBuffer] | list[CudaBuffer]
        if device.type == "cuda":
            self._buffers = [CudaBuffer(self._num_bytes, device) for _ in range(NUM_BUFFERS)]
        else:
            self._buffers = [SharedBuffer(self._num_bytes) for _ in range(NUM_BUFFERS)]
            for buffer in self._buffers:
                buffer.seal()
        self._audience = Audience(self._endpoint, link, region.source_rank)
        self._packers = [
            Packer(bucket.region, self._buffers[index % NUM_BUFFERS].flat, sources)
            for index, bucket in enumerate(cut(region, self._num_bytes))
        ]

    def offer(self) -> StreamOffer:
        handles: list[Handle | CudaHandle] = [buffer.handle for buffer in self._buffers]
        return StreamOffer(Owner.this_process(), self._endpoint, self._num_bytes, handles)

    def attach(self, offers: Offers) -> None: ...

    def publish(self, version: int, verify: bool) -> Packed:
        """Returns when every receiver has the version, except those that were given up: they fail by themselves."""
        self._audience.begin(version)
        seals = b""
        pack_s = digest_s = 0.0
        for index, packer in enumerate(self._packers):
            if index >= NUM_BUFFERS:
                self._audience.wait_until_loaded(index + 1 - NUM_BUFFERS)
            packed = packer.write(version, verify)
            self._audience.announce(packed.seal)
            seals += packed.seal or b""
            pack_s, digest_s = pack_s + packed.pack_s, digest_s + packed.digest_s
        self._audience.wait_until_loaded(len(self._packers))
        return Packed(digest(seals) if verify else None, pack_s, digest_s)

    def close(self) -> None:
        self._audience.close()
        remove_run_folder(self._folder)
        for buffer in self._buffers:
            buffer.close()


class StreamReceiver:
    def __init__(self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers) -> None:
        self._link, self._owner = link, Owner.this_process()
        self._landed = LandedImages(regions, landing)
        self._sources = [_Source(rank, region, offers[rank], self._landed) for rank, region in regions.items()]
        self._poller = zmq.Poller()
        for source in self._sources:
            self._poller.register(source.socket, zmq.POLLIN)
        self._tickets = itertools.count(secrets.randbits(32) << 30)

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        start, ticket = time.perf_counter(), next(self._tickets)
        half = self._landed.half(version)
        ready = Ready(version, ticket, self._link.receiver_rank, self._owner.pid, self._owner.started_ticks)
        for source in self._sources:
            source.inflows[half].begin()
            source.say(ready)
        try:
            verify_s = self._load_all(version, ticket, {source.socket: source for source in self._sources})
        except BaseException:
            for source in self._sources:
                source.say(Left(ticket))
            raise
        return Landed(time.perf_counter() - start - verify_s, verify_s)

    def _load_all(self, version: int, ticket: int, waiting: "dict[zmq.Socket[bytes], _Source]") -> float:
        """Load what comes from any source until all of it is here. Returns the seconds that digests took."""
        deadline, verify_s = Deadline(self._link.timeout_s * WHOLE_SHARE), 0.0
        while waiting:
            if deadline.left_s() == 0:
                late = ", ".join(f"{s.rank} ({s.progress(self._landed.half(version))})" for s in waiting.values())
                raise TimeoutError(f"version {version}: not here within {deadline.seconds:.1f} s: train rank {late}")
            came = self._poller.poll(round(min(LOOK_S, deadline.left_s()) * 1e3))
            for source in waiting.values() if not came else ():
                if not source.owner.is_alive():
                    raise ConnectionError(f"version {version}: the process of train rank {source.rank} has ended")
            for socket, _ in came:
                frame = from_source(socket.recv())
                if frame.ticket != ticket or socket not in waiting:
                    continue  # of a version that was given up, or late news of one that is here
                source = waiting[socket]
                if isinstance(frame, Missed):
                    raise TimeoutError(f"version {version}: train rank {source.rank} went on without this engine")
                inflow = source.inflows[self._landed.half(version)]
                verify_s += inflow.load(frame.bucket, version, frame.seal)
                source.say(Loaded(ticket, frame.bucket))
                if inflow.is_whole:
                    del waiting[socket]
        return verify_s

    def check(self, version: int) -> None:
        self._landed.check(version)

    def image(self, version: int) -> torch.Tensor:
        return self._landed.image(version)

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return self._landed.views(version)

    def close(self) -> None:
        for source in self._sources:
            source.socket.close()


class _Source:
    """A receiver's side of one train rank: its socket, and its buckets' way into each landing image."""

    def __init__(self, rank: int, region: Region, offer: StreamOffer, landed: LandedImages) -> None:
        self.rank, self.owner = rank, offer.owner
        buffers = [
            open_cuda_buffer(handle) if isinstance(handle, CudaHandle) else open_buffer(handle, writable=False)
            for handle in offer.buffers
        ]
        buckets = cut(region, offer.num_bytes)
        self.inflows = [Inflow(region, buckets, buffers, flat) for flat in landed.flats]
        self.socket = open_socket(zmq.DEALER)
        self.socket.connect(offer.endpoint)

    def say(self, frame: FromReceiver) -> None:
        """Never waits: a source that takes no frames will be missed soon enough."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(encode(frame), zmq.DONTWAIT)

    def progress(self, half: int) -> str:
        return f"{self.inflows[half].num_loaded} of {self.inflows[half].num_buckets} buckets"
