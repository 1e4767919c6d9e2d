"""Who holds which indices of which tensor: geometry without torch.

A tensor is known by the trainer's name and its global shape. A Shard says that a rank holds a Box of it, at some place
of a local tensor (its storage). The trainer's storage is its local shard; the engine's may be a slice of a fused
parameter: with q of 128 and k of 64 rows, k_proj lives in qkv_proj from row 128 on:

    Shard(tensor="model.layers.0.self_attn.k_proj.weight", box=Box((0, 0), (64, 128)), rank=0,
          storage="model.layers.0.self_attn.qkv_proj.weight", offset=(128, 0))
"""

import math
from collections.abc import Iterator
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
    """`rank` holds `box` of `tensor` in its local tensor `storage`, from index `offset` on."""

    tensor: str
    box: Box
    rank: int
    storage: str
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What one group of ranks holds: each tensor's global shape, and the shards of it."""

    shapes: dict[str, tuple[int, ...]]
    shards: list[Shard]
    dtypes: dict[str, str]
    """Dtype of each storage, as torch names it: "float32"."""

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards)


def merge(layouts: list[Layout]) -> Layout:
    """The layout of a group from those of its ranks, which must agree on every global shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for layout in layouts:
        for name, shape in layout.shapes.items():
            assert shapes.setdefault(name, shape) == shape, f"{name}: {shapes[name]} on one rank, {shape} on another"
        dtypes |= layout.dtypes
    return Layout(shapes, [shard for layout in layouts for shard in layout], dtypes)
