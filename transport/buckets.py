"""Weights in buckets: what a transport needs that moves a region through two small buffers in turn.

A bucket is a run of pieces, and of parts of pieces too large for one, with a receipt of its own behind them, so that it
is packed, moved and verified by itself. Both ends cut a region alike, from its geometry and the buffers' size alone.
Bucket k goes through buffer k % 2: one is filled while the other is loaded.

Invariant: the buckets of a region hold each of its elements exactly once, and none is longer than a buffer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from transport.arena import ALIGNMENT_BYTES, Piece, Region, aligned, itemsize, receipt_bytes, run
from transport.base import Landing
from transport.packing import FusedCopy
from transport.pages import HUGE_PAGE_BYTES
from transport.receipt import VerificationError, check_digests, check_version, withdraw_receipt, write_receipt

NUM_BUFFERS = 2
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 4 << 20, 16 << 20
MAX_CUDA_BUFFER_BYTES = 64 << 20
"""On a GPU the two sides' messages cost more than a pass over so many bytes."""
MEMORY_SHARE = 256
"""A buffer takes one part in so many of what is free, within those bounds."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """`region` is how the parts lie in a buffer, `landed` where each of them lies in the region that was cut."""

    region: Region
    landed: list[Piece]


def buffer_bytes(device: torch.device) -> int:
    """The length of one buffer, by the memory that is free now."""
    if device.type == "cuda":
        return bounded(torch.cuda.mem_get_info(device)[0] // MEMORY_SHARE, MAX_CUDA_BUFFER_BYTES)
    return bounded(psutil.virtual_memory().available // MEMORY_SHARE)


def bounded(num_bytes: int, max_bytes: int = MAX_BUFFER_BYTES) -> int:
    """Whole huge pages, within the bounds of a buffer."""
    return min(max(num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MIN_BUFFER_BYTES), max_bytes)


def cut(region: Region, num_bytes: int) -> list[Bucket]:
    """The region in buckets of at most `num_bytes`, receipts included, each filled as far as whole rows allow."""
    assert num_bytes % ALIGNMENT_BYTES == 0, num_bytes
    buckets: list[list[Piece]] = []
    parts: list[Piece] = []
    used = 0
    for whole in region.pieces:
        for piece in _with_small_rows(whole, num_bytes - receipt_bytes(1)):
            rest: Piece | None = piece
            while rest is not None:
                part, rest = _first_rows(rest, num_bytes - used - receipt_bytes(len(parts) + 1))
                if part is None:
                    buckets.append(parts)
                    parts, used = [], 0
                else:
                    parts.append(part)
                    used += aligned(part.num_bytes)
    buckets.append(parts)
    return [Bucket(run(region.source_rank, (part.copy for part in parts)), parts) for parts in buckets]


def _with_small_rows(piece: Piece, max_bytes: int) -> Iterator[Piece]:
    """The piece, or parts of it, so that one row of each fits in `max_bytes`."""
    if _row_bytes(piece) <= max_bytes:
        yield piece
        return
    for index in range(piece.copy.shape[_rows_dimension(piece)]):
        yield from _with_small_rows(_rows(piece, index, 1), max_bytes)


def _first_rows(piece: Piece, max_bytes: int) -> tuple[Piece | None, Piece | None]:
    """As many rows of the piece as fit in `max_bytes`, and the rest; None for nothing."""
    if piece.num_bytes <= max_bytes:
        return piece, None
    num = max_bytes // _row_bytes(piece)
    if num <= 0:
        return None, piece
    return _rows(piece, 0, num), _rows(piece, num, piece.copy.shape[_rows_dimension(piece)] - num)


def _rows_dimension(piece: Piece) -> int:
    """The dimension that a piece is cut along: the first that has more than one index."""
    return next((dimension for dimension, length in enumerate(piece.copy.shape) if length > 1), 0)


def _row_bytes(piece: Piece) -> int:
    return piece.num_bytes // piece.copy.shape[_rows_dimension(piece)] if piece.copy.shape else piece.num_bytes


def _rows(piece: Piece, first: int, num: int) -> Piece:
    dimension = _rows_dimension(piece)
    copy = piece.copy

    def moved(start: tuple[int, ...]) -> tuple[int, ...]:
        return (*start[:dimension], start[dimension] + first, *start[dimension + 1 :])

    part = replace(
        copy,
        source_start=moved(copy.source_start),
        destination_start=moved(copy.destination_start),
        shape=(*copy.shape[:dimension], num, *copy.shape[dimension + 1 :]),
    )
    return Piece(part, piece.offset + first * piece.strides[dimension] * itemsize(copy.dtype), piece.strides)


class Inflow:
    """One source's buckets on their way into one landing image, in order.

    The image's region is no version from `begin` on until the last bucket has been loaded.

    Args:
        buffers: what the buckets arrive in, the same memory every time.
        flat: the landing image.
    """

    def __init__(
        self, region: Region, buckets: Sequence[Bucket], buffers: Sequence[torch.Tensor], flat: torch.Tensor
    ) -> None:
        self._region, self._buckets, self._buffers, self._flat = region, buckets, buffers, flat
        self._copies = []
        for index, bucket in enumerate(buckets):
            buffer = buffers[index % NUM_BUFFERS]
            pairs = [
                (landed.view(flat), piece.view(buffer))
                for landed, piece in zip(bucket.landed, bucket.region.pieces, strict=True)
            ]
            self._copies.append(FusedCopy(pairs))
        self.num_loaded = 0

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    @property
    def is_whole(self) -> bool:
        return self.num_loaded == self.num_buckets

    def begin(self) -> None:
        withdraw_receipt(self._flat, self._region)
        self.num_loaded = 0

    def load(self, index: int, version: int, seal: bytes | None) -> float:
        """Copy the next bucket from its buffer to its places and, with a seal, compare what has landed with it.

        Returns the seconds that digests took.

        Raises:
            VerificationError: it is not the next bucket of `version`, or not what was published.
        """
        if index != self.num_loaded or self.is_whole:
            raise VerificationError(
                f"version {version} from train rank {self._region.source_rank}: bucket {index} came when "
                f"{self.num_loaded} of {self.num_buckets} were here"
            )
        buffer, bucket = self._buffers[index % NUM_BUFFERS], self._buckets[index].region
        check_version(buffer, bucket, version)
        digests, digest_s = self._copies[index].run(seal is not None)
        if seal is not None:
            check_digests(buffer, bucket, version, seal, digests)
        self.num_loaded += 1
        if self.is_whole:
            write_receipt(self._flat, self._region, version, b"")
        return digest_s


class LandedImages:
    """The images of an engine that all sources of its channel write side by side: what a Receiver shows of them."""

    def __init__(self, regions: dict[int, Region], landing: Landing) -> None:
        self._regions = regions
        num_bytes = max(region.num_bytes for region in regions.values())
        self.flats = [landing.flat(half, num_bytes) for half in range(landing.num_halves)]
        self._views = [
            {rank: [piece.view(flat) for piece in region.pieces] for rank, region in regions.items()}
            for flat in self.flats
        ]

    def half(self, version: int) -> int:
        return version % len(self.flats)

    def check(self, version: int) -> None:
        """Raises VerificationError unless every source's region holds `version`, whole."""
        for region in self._regions.values():
            check_version(self.flats[self.half(version)], region, version)

    def image(self, version: int) -> torch.Tensor:
        return self.flats[self.half(version)]

    def views(self, version: int) -> dict[int, list[torch.Tensor]]:
        return self._views[self.half(version)]
