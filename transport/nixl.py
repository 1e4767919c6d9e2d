"""Ray Direct Transport over NIXL: receivers read the train ranks' registered buffers into their own, across hosts too.

One-sided and without a process group: what a publisher offers is a boxed Ray reference per half, made once and read
again at every refit, so an engine that joins later needs nothing else. One read per train rank, whatever the number of
tensors.
"""

import importlib
import mmap
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.experimental import register_nixl_memory, set_target_for_ref

from transport.arena import Region, aligned, allocate, image, run
from transport.base import Copies, Landed, Landing, Link, Offers, Parameters
from transport.packing import Packed, Packer, Unpacker

PROGRESS_DELAY_US = 2000
NUM_HALVES = 2


class NixlTransport:
    one_sided = True

    def arrange(self, parameters: Parameters, copies: Copies) -> dict[int, Region]:
        """An image where one train rank sends everything, so that an engine can turn to what arrived; else runs."""
        if len(copies) == 1:
            return image(parameters, copies)
        return {rank: run(rank, own) for rank, own in copies.items()}

    def publisher(
        self, link: Link, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device
    ) -> "NixlPublisher":
        return NixlPublisher(region, sources, device)

    def receiver(self, link: Link, regions: dict[int, Region], landing: Landing, offers: Offers) -> "NixlReceiver":
        return NixlReceiver(regions, landing, offers)


class NixlPublisher:
    def __init__(self, region: Region, sources: Mapping[str, torch.Tensor], device: torch.device) -> None:
        rest_progress_thread()
        flats = [allocate(region.num_bytes, device) for _ in range(NUM_HALVES)]
        for flat in flats:
            register_nixl_memory(flat)
        self._packers = [Packer(region, flat, sources) for flat in flats]
        self._boxes = [[ray.put([flat], _tensor_transport="nixl")] for flat in flats]

    def offer(self) -> list[list[Any]]:
        return self._boxes

    def attach(self, offers: Offers) -> None: ...

    def publish(self, version: int, verify: bool) -> Packed:
        return self._packers[version % NUM_HALVES].write(version, verify)

    def close(self) -> None:
        self._boxes = []


class NixlReceiver:
    def __init__(self, regions: dict[int, Region], landing: Landing, offers: Offers) -> None:
        rest_progress_thread()
        self._boxes: dict[int, list[list[Any]]] = dict(offers)
        self._is_image, self._device = len(regions) == 1, landing.device
        self._num_halves = landing.num_halves if self._is_image else 1
        self._unpackers: list[dict[int, Unpacker]] = []
        for half in range(self._num_halves):
            unpackers = {}
            for rank, region in regions.items():
                if self._is_image:
                    flat = landing.flat(half, region.num_bytes)[: aligned(region.num_bytes, mmap.PAGESIZE)]
                else:
                    flat = allocate(region.num_bytes, landing.device)
                register_nixl_memory(flat)
                unpackers[rank] = Unpacker(region, flat)
            self._unpackers.append(unpackers)

    def stage(self, version: int, packed: Mapping[int, Packed]) -> Landed:
        pull_s = verify_s = 0.0
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # gives this thread the GPU's context, for UCX
        for rank, unpacker in self._at(version).items():
            start = time.perf_counter()
            self._pull(rank, version, unpacker.flat)
            pulled = time.perf_counter()
            unpacker.check(version, packed[rank].seal)
            pull_s, verify_s = pull_s + pulled - start, verify_s + time.perf_counter() - pulled
        return Landed(pull_s, verify_s)

    def _pull(self, rank: int, version: int, target: torch.Tensor) -> None:
        (reference,) = self._boxes[rank][version % NUM_HALVES]
        set_target_for_ref(reference, [target])
        (received,) = ray.get(reference)
        if received.data_ptr() != target.data_ptr():
            raise RuntimeError(f"train rank {rank}: the bytes went to fresh memory instead of the registered buffer")

    def check(self, version: int) -> None:
        for unpacker in self._at(version).values():
            unpacker.check(version, None)

    def image(self, version: int) -> torch.Tensor | None:
        return next(iter(self._at(version).values())).flat if self._is_image else None

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return {rank: unpacker.views for rank, unpacker in self._at(version).items()}

    def close(self) -> None:
        self._boxes = {}

    def _at(self, version: int) -> dict[int, Unpacker]:
        return self._unpackers[version % self._num_halves]


def rest_progress_thread() -> None:
    """Let NIXL's progress thread sleep between polls; must run before this process makes its agent.

    The Python binding fixes the delay at 0, which burns a core in every actor for ever (measured: 90 to 97 %, idle or
    not; with 2 ms under 1 %, and pulls no slower).
    """
    api = importlib.import_module("nixl._api")
    if not isinstance(api.nixlBind, _PatientBindings):
        api.nixlBind = _PatientBindings(api.nixlBind)  # type: ignore[attr-defined]


class _PatientBindings:
    """NIXL's bindings, except that every agent polls with a delay."""

    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, agent_config: Any) -> Any:  # noqa: N802
        agent_config.pthrDelay = PROGRESS_DELAY_US
        return self._bindings.nixlAgent(name, agent_config)
