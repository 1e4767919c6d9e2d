"""Flat buffers that weights travel in, and where each piece of a tensor lies in them.

A Region is what one train rank sends to one destination: its pieces, and a receipt of their digests behind them. It is
arranged in one of two ways. `run`: back to back in plan order, one contiguous stretch for one transfer, whatever the
number of tensors. `image`: each piece where the engine wants it, so that a parameter can be turned to the buffer; the
train ranks of a host write their own pieces into one image side by side.

Buffers live as long as the worker that made them: page faults on fresh ones cost more than the transfer itself.
"""

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from transport.plan import Copy

ALIGNMENT_BYTES = 64
RECEIPT_HEADER_BYTES = 16
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A copy's elements in a buffer: from byte `offset` of it on, `strides` elements apart in each dimension."""

    copy: Copy
    offset: int
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.copy.shape) * itemsize(self.copy.dtype)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This piece of the buffer `flat` (uint8), as a tensor of its own shape and dtype."""
        dtype = getattr(torch, self.copy.dtype)
        aligned = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        first = aligned.storage_offset() + self.offset // dtype.itemsize
        return aligned.as_strided(self.copy.shape, self.strides, first)


@dataclass(frozen=True, slots=True)
class Region:
    """One train rank's pieces for one destination, in a buffer of `num_bytes`; their receipt is at `receipt_offset`."""

    source_rank: int
    pieces: list[Piece]
    receipt_offset: int
    num_bytes: int

    @property
    def payload_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def aligned(num_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return -(-num_bytes // alignment) * alignment


def receipt_bytes(num_pieces: int) -> int:
    return aligned(RECEIPT_HEADER_BYTES + num_pieces * DIGEST_BYTES)


def run(source_rank: int, copies: Iterable[Copy]) -> Region:
    """The copies of one source and one destination, back to back."""
    pieces, end = [], 0
    for copy in copies:
        pieces.append(Piece(copy, end, contiguous_strides(copy.shape)))
        end += aligned(pieces[-1].num_bytes)
    return Region(source_rank, pieces, end, end + receipt_bytes(len(pieces)))


def image_offsets(parameters: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, int], int]:
    """Byte offset of each engine parameter (shape, dtype) in an image of all of them, and the end of the last."""
    offsets, end = {}, 0
    for name, (shape, dtype) in parameters.items():
        offsets[name] = end
        end += aligned(math.prod(shape) * itemsize(dtype))
    return offsets, end


def image(
    parameters: Mapping[str, tuple[tuple[int, ...], str]], copies: Mapping[int, Iterable[Copy]]
) -> dict[int, Region]:
    """A region per source rank, all in one buffer: the engine's parameters, then every rank's receipt."""
    offsets, end = image_offsets(parameters)
    placed: dict[int, list[Piece]] = {}
    for rank, own in copies.items():
        placed[rank] = []
        for copy in own:
            strides = contiguous_strides(parameters[copy.destination_storage][0])
            first = sum(start * stride for start, stride in zip(copy.destination_start, strides, strict=True))
            offset = offsets[copy.destination_storage] + first * itemsize(copy.dtype)
            placed[rank].append(Piece(copy, offset, strides))
    receipts = {}
    for rank, pieces in placed.items():
        receipts[rank] = end
        end += receipt_bytes(len(pieces))
    return {rank: Region(rank, pieces, receipts[rank], end) for rank, pieces in placed.items()}


def image_views(flat: torch.Tensor, parameters: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
    """Each engine parameter in an image."""
    offsets, _ = image_offsets(parameters)
    views = {}
    for name, (shape, dtype) in parameters.items():
        num_bytes = math.prod(shape) * itemsize(dtype)
        views[name] = flat[offsets[name] : offsets[name] + num_bytes].view(getattr(torch, dtype)).view(shape)
    return views


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A flat uint8 buffer of at least `num_bytes`: whole pages, already touched, in huge pages where there are some."""
    num_bytes = max(aligned(num_bytes, mmap.PAGESIZE), mmap.PAGESIZE)
    if device.type != "cpu":
        flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.current_stream(device).synchronize()  # who writes it next does not know this stream
        return flat
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).zero_()
