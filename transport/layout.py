"""Who holds which indices of which tensor: geometry without torch.

A tensor is known by the trainer's name and its global shape. A Placement says in which local tensor (its storage) a
group of ranks keeps it, and a Shard which Box of it one rank has there. The trainer's storage is its local shard; the
engine's may be a slice of a fused parameter: with q of 128 and k of 64 rows, k_proj lives in qkv_proj from row 128 on:

    Placement(tensor="model.layers.0.self_attn.k_proj.weight", shape=(64, 128),
              storage="model.layers.0.self_attn.qkv_proj.weight", dtype="bfloat16",
              shards=(Shard(rank=0, box=Box((0, 0), (64, 128)), offset=(128, 0)),))

Tensors of equal geometry share one `shards` tuple: a plan of 36,945 tensors works on a few dozen distinct ones.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of indices: `shape[d]` of them from `start[d]` on, in every dimension d."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The indices in both, or None."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        shape = tuple(high - low for low, high in zip(start, stop, strict=True))
        return Box(start, shape) if all(length > 0 for length in shape) else None

    def subtract(self, inner: "Box") -> "list[Box]":
        """The indices outside `inner`, which lies within this box, as disjoint boxes."""
        rest, start, shape = [], list(self.start), list(self.shape)
        for d, (low, length) in enumerate(zip(inner.start, inner.shape, strict=True)):
            before, after = low - start[d], start[d] + shape[d] - low - length
            if before > 0:
                rest.append(Box(tuple(start), (*shape[:d], before, *shape[d + 1 :])))
            if after > 0:
                rest.append(Box((*start[:d], low + length, *start[d + 1 :]), (*shape[:d], after, *shape[d + 1 :])))
            start[d], shape[d] = low, length
        return rest


@dataclass(frozen=True, slots=True)
class Shard:
    """`rank` holds `box` of a tensor in its storage, from index `offset` on."""

    rank: int
    box: Box
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a group of ranks keeps a tensor of global `shape`: in the local tensor `storage` of each.

    `dtype` is that of the storage, as torch names it: "float32".
    """

    tensor: str
    shape: tuple[int, ...]
    storage: str
    dtype: str
    shards: tuple[Shard, ...]


Layout = list[Placement]
"""What one rank or a group of ranks holds; a tensor with two storages (a head that an engine owns) comes twice."""


def merge(layouts: Iterable[Layout]) -> Layout:
    """The layout of a group from those of its ranks, in the order of the first rank that holds each tensor. One that
    ranks keep in different dtypes stays a placement for each of these.

    Raises:
        AssertionError: ranks disagree on a tensor's global shape.
    """
    grouped: dict[tuple[str, str, str], list[Placement]] = {}
    for layout in layouts:
        for placement in layout:
            grouped.setdefault((placement.tensor, placement.storage, placement.dtype), []).append(placement)
    shared: dict[tuple[int, ...], tuple[Shard, ...]] = {}
    merged = []
    for (tensor, storage, _), placements in grouped.items():
        first = placements[0]
        for other in placements:
            assert other.shape == first.shape, f"{tensor}: {first.shape} on one rank, {other.shape} on another"
        key = tuple(id(placement.shards) for placement in placements)
        shards = shared.get(key)
        if shards is None:
            shards = shared[key] = tuple(shard for placement in placements for shard in placement.shards)
        merged.append(Placement(tensor, first.shape, storage, first.dtype, shards))
    return merged


def share(layout: Layout) -> Layout:
    """The same layout, equal `shards` being one object, as `merge` and `plan_transfer` like them."""
    known: dict[tuple[Shard, ...], tuple[Shard, ...]] = {}
    return [Placement(p.tensor, p.shape, p.storage, p.dtype, known.setdefault(p.shards, p.shards)) for p in layout]
