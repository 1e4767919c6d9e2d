"""Which transport a pair of trainer and engine can use, found out by trying, not by guessing.

Every train rank keeps a Probe: a page of shared memory with known bytes. An engine rank tries to open it and to read it
across the process boundary; `choose` turns the answers into a transport and, where a better one was out of reach, the
reason.
"""

import ctypes
import os
import secrets
from dataclasses import dataclass

import torch

from transport.host import host_identity
from transport.memfd import (
    Handle,
    SharedBuffer,
    SharedMemoryUnavailable,
    can_read_memory_of,
    open_buffer,
)

PROBE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Site:
    """Where a train rank is: its host, device, process, and what a peer finds there."""

    host: str
    device: str
    pid: int
    address: int
    expected: bytes
    handle: Handle | None
    unavailable: str = ""
    """Why there is no shared memory."""
    gpu: str = ""
    """The GPU's id, the same in every process; empty on a CPU."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What an engine rank can do with the train ranks' memory; `why_not_shared` is the first obstacle."""

    device: str
    same_host: bool
    can_share: bool
    can_read: bool
    why_not_shared: str = ""
    host: str = ""
    gpu: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """`type` as in `transport.type`; `reason` is empty where nothing was lost."""

    type: str
    reason: str = ""


class Probe:
    """A train rank's page; lives as long as the worker."""

    def __init__(self, device: str) -> None:
        expected = secrets.token_bytes(PROBE_BYTES)
        self._bytes = ctypes.create_string_buffer(expected, PROBE_BYTES)
        handle, unavailable = None, ""
        try:
            self._page = SharedBuffer(PROBE_BYTES)
            self._page.flat[:PROBE_BYTES] = torch.frombuffer(bytearray(expected), dtype=torch.uint8)
            self._page.seal()
            handle = self._page.handle
        except OSError as error:
            unavailable = f"no anonymous shared memory: {error}"
        address = ctypes.addressof(self._bytes)
        self.site = Site(host_identity(), device, os.getpid(), address, expected, handle, unavailable, gpu_of(device))


def gpu_of(device: str) -> str:
    """The id of the GPU that this process works on."""
    return str(torch.cuda.get_device_properties(0).uuid) if device == "cuda" else ""


def reach(sites: list[Site], device: str) -> Reach:
    """Try every train rank from this process."""
    gpu = gpu_of(device)
    if any(site.host != host_identity() for site in sites):
        return Reach(device, False, False, False, "trainer and engine are on different hosts", host_identity(), gpu)
    why_not = ""
    for site in sites:
        try:
            if site.handle is None:
                raise SharedMemoryUnavailable(site.unavailable)
            if open_buffer(site.handle, writable=False)[:PROBE_BYTES].numpy().tobytes() != site.expected:
                raise SharedMemoryUnavailable(f"process {site.pid} shares other bytes than expected")
        except OSError as error:
            why_not = why_not or str(error)
    can_read = all(can_read_memory_of(site.pid, site.address, site.expected) for site in sites)
    return Reach(device, True, not why_not, can_read, why_not, host_identity(), gpu)


def choose(wanted: str, sites: list[Site], engine: Reach) -> Choice:
    """The transport for one engine rank.

    Raises:
        ValueError: `transport.type` names one that cannot work here.
    """
    on_cpu = engine.device == "cpu" and all(site.device == "cpu" for site in sites)
    if wanted in ("shared_memory", "stream"):
        if wanted == "shared_memory" and not on_cpu:
            raise ValueError("transport.type=shared_memory needs the CPU: on CUDA use nixl, or stream where colocated")
        if not engine.can_share and (on_cpu or not engine.same_host):
            raise ValueError(f"transport.type={wanted}: {engine.why_not_shared}; use nixl, object_store or auto")
    if wanted == "stream" and any(site.device != engine.device for site in sites):
        raise ValueError("transport.type=stream needs trainer and engine on one kind of device; use nixl or auto")
    if wanted == "collective" and engine.gpu and any(site.gpu == engine.gpu for site in sites):
        raise ValueError("transport.type=collective: NCCL has no group within one GPU; use nixl, stream or auto")
    if wanted != "auto":
        return Choice(wanted)
    if not on_cpu or not engine.same_host:
        return Choice("nixl")
    if engine.can_share:
        return Choice("shared_memory")
    if engine.can_read:
        return Choice("nixl", engine.why_not_shared)
    return Choice("object_store", f"{engine.why_not_shared}; and no ptrace permission, which NIXL needs on one host")
