"""Plan a transfer: which rank copies which box of which tensor where. Pure geometry, computed once.

Invariant: every element of every destination shard is written exactly once, from a rank that holds it.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from transport.layout import Box, Layout, Shard


class PlanError(ValueError):
    """The source cannot fill the destination; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Read `shape` elements from `source_start` of a source rank's storage; write them at `destination_start`."""

    source_rank: int
    source_storage: str
    source_start: tuple[int, ...]
    destination_rank: int
    destination_storage: str
    destination_start: tuple[int, ...]
    shape: tuple[int, ...]


def plan_transfer(source: Layout, destination: Layout) -> list[Copy]:
    """Copies that fill every destination shard from the source.

    Where several source ranks hold the same elements (replicas), each destination shard takes them from the rank with
    the fewest elements to send so far.

    Raises:
        PlanError: a destination tensor is unknown to the source, has another shape there, or is not fully covered.
    """
    holders: dict[str, list[Shard]] = defaultdict(list)
    for shard in source:
        holders[shard.tensor].append(shard)
    load: dict[int, int] = defaultdict(int)
    copies: list[Copy] = []
    for wanted in destination:
        if wanted.tensor not in source.shapes:
            raise PlanError(f"{wanted.storage}: the trainer has no tensor {wanted.tensor}")
        ours, theirs = source.shapes[wanted.tensor], destination.shapes[wanted.tensor]
        if ours != theirs:
            raise PlanError(f"{wanted.tensor}: shape {ours} in the trainer, {theirs} in the engine")
        filled = _fill(wanted, sorted(holders[wanted.tensor], key=lambda shard: load[shard.rank]))
        for copy in filled:
            load[copy.source_rank] += math.prod(copy.shape)
        copies += filled
    return copies


def _fill(wanted: Shard, held: list[Shard]) -> list[Copy]:
    """Copies for one destination shard; what several ranks hold is taken from the first of them."""
    copies, missing = [], [wanted.box]
    for shard in held:
        left = []
        for box in missing:
            common = box.intersect(shard.box)
            if common is None:
                left.append(box)
                continue
            left += box.subtract(common)
            source, destination = _place(shard, common), _place(wanted, common)
            copies.append(
                Copy(shard.rank, shard.storage, source, wanted.rank, wanted.storage, destination, common.shape)
            )
        missing = left
    if missing:
        covered = wanted.box.size - sum(box.size for box in missing)
        raise PlanError(f"{wanted.tensor}: {covered} of {wanted.box.size} elements are held by a train rank")
    return copies


def _place(shard: Shard, box: Box) -> tuple[int, ...]:
    """Where a global box begins in the shard's storage."""
    return tuple(o + b - s for o, b, s in zip(shard.offset, box.start, shard.box.start, strict=True))
