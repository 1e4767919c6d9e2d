"""One page-aligned, pre-faulted flat buffer that holds a rank's shards back to back.

Both sides build it from the same list of slots, so a position needs no message. The bytes of a rank's shards, already
in the engine's dtype, are one contiguous run: one transfer, whatever the number of tensors. Held for the life of a
worker: page faults on fresh buffers cost more than the transfer itself.
"""

import math
import mmap
from dataclasses import dataclass

import torch

from transport.layout import Layout
from transport.plan import PlanError

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """A shard's place in the arena: `shape` elements of `dtype` from byte `offset` on."""

    storage: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def slots_for(source: Layout, destination: Layout) -> list[list[Slot]]:
    """Each source rank's slots, in the dtype in which the destination wants each tensor. Indexed by rank.

    Raises:
        PlanError: engine parameters made of one trainer tensor differ in dtype.
    """
    dtypes: dict[str, str] = {}
    for wanted in destination:
        dtype = destination.dtypes[wanted.storage]
        if dtypes.setdefault(wanted.tensor, dtype) != dtype:
            raise PlanError(f"{wanted.tensor}: the engine wants it as {dtypes[wanted.tensor]} and as {dtype}")
    num_ranks = 1 + max(shard.rank for shard in source)
    slots: list[list[Slot]] = [[] for _ in range(num_ranks)]
    ends = [0] * num_ranks
    for shard in source:
        if shard.tensor not in dtypes:
            raise PlanError(f"{shard.tensor}: the engine has no such tensor, so a refit would lose it")
        slot = Slot(shard.storage, shard.box.shape, dtypes[shard.tensor], ends[shard.rank])
        slots[shard.rank].append(slot)
        ends[shard.rank] += -(-slot.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return slots


class Arena:
    """The buffer `flat` (uint8) and a typed view of it per storage, in `views`."""

    def __init__(self, slots: list[Slot], device: torch.device) -> None:
        num_bytes = max((slot.offset + slot.num_bytes for slot in slots), default=0)
        num_bytes = max(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
        if device.type == "cpu":
            pages = mmap.mmap(-1, num_bytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self.flat = torch.frombuffer(pages, dtype=torch.uint8)
            self.flat.zero_()
        else:
            self.flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.num_bytes = sum(slot.num_bytes for slot in slots)
        self.views = {
            slot.storage: self.flat[slot.offset : slot.offset + slot.num_bytes]
            .view(getattr(torch, slot.dtype))
            .view(slot.shape)
            for slot in slots
        }
