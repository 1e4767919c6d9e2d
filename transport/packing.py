"""Writing a Region's pieces into a buffer and reading them back, everything prepared once.

`Packer` belongs to the train rank: one pass casts its shards to the engine's dtype and, where a refit is verified,
takes each piece's digest while the bytes are still in the cache. `Unpacker` belongs to the engine rank: it takes the
digests again where the bytes have landed, and gives the pieces as views. Neighbours in both memories are cast as one,
so the cost follows the bytes and not the number of tensors.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from transport.arena import Piece, Region
from transport.receipt import check_digests, check_version, digest, withdraw_receipt, write_receipt

BLOCK_BYTES = 1 << 19
"""Bytes that are cast and then digested: they fit a core's cache together with their source."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a train rank announces of one published region: the seal of its receipt (None: not verified), the seconds
    that were spent, and where a transport needs one per version, a reference to the bytes."""

    seal: bytes | None
    pack_s: float
    digest_s: float
    reference: Any = None


@dataclass(slots=True)
class _Block:
    """One cast from `source` to `destination`, then the digests of what lies in it: (index of piece, bytes)."""

    destination: torch.Tensor
    source: torch.Tensor
    pieces: list[tuple[int, torch.Tensor]]


class Packer:
    """Writes one region. Keeps views of `flat` and of `sources`: both live as long as it does.

    Args:
        sources: this rank's storage of each tensor, its local shard.
    """

    def __init__(self, region: Region, flat: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
        self._region, self.flat = region, flat
        pairs = [(piece.view(flat), source_view(piece, sources)) for piece in region.pieces]
        self._blocks = _blocks(pairs) if flat.device.type == "cpu" else []
        spans = _spans(pairs)
        self._destinations, self._sources = [d for d, _ in spans], [s for _, s in spans]
        self._written = [destination for destination, _ in pairs]

    @torch.no_grad()
    def write(self, version: int, verify: bool) -> Packed:
        """Cast every piece into the buffer and write the receipt."""
        start = time.perf_counter()
        withdraw_receipt(self.flat, self._region)
        if verify and self._blocks:
            digests, digest_s = self._write_blocks()
        else:
            torch._foreach_copy_(self._destinations, self._sources)
            if self.flat.is_cuda:
                torch.cuda.synchronize(self.flat.device)
            packed = time.perf_counter()
            digests = [digest(_bytes(piece)) for piece in self._written] if verify else []
            digest_s = time.perf_counter() - packed
        seal = write_receipt(self.flat, self._region, version, b"".join(digests))
        return Packed(seal if verify else None, time.perf_counter() - start - digest_s, digest_s)

    def _write_blocks(self) -> tuple[list[bytes], float]:
        hashers: dict[int, xxhash.xxh3_128] = {}
        digests = [b""] * len(self._region.pieces)
        digest_s = 0.0
        for block in self._blocks:
            block.destination.copy_(block.source)
            begin = time.perf_counter()
            for index, part in block.pieces:
                if part.numel() == self._written[index].numel():
                    digests[index] = digest(_bytes(part))
                    continue
                hasher = hashers.setdefault(index, xxhash.xxh3_128())
                hasher.update(_bytes(part))
                digests[index] = b""
            digest_s += time.perf_counter() - begin
        for index, hasher in hashers.items():
            digests[index] = hasher.digest()
        return digests, digest_s


class Unpacker:
    """Reads one region from `flat`, where it has landed."""

    def __init__(self, region: Region, flat: torch.Tensor) -> None:
        self._region, self.flat = region, flat
        self.views = [piece.view(flat) for piece in region.pieces]

    def check(self, version: int, seal: bytes | None) -> None:
        """Raises VerificationError unless this is `version`, and (with a seal) unless every digest agrees."""
        check_version(self.flat, self._region, version)
        if seal is not None:
            check_digests(self.flat, self._region, version, seal, [digest(_bytes(view)) for view in self.views])


def source_view(piece: Piece, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The piece in the local shard that it comes from."""
    return narrow(sources[piece.copy.source_storage], piece.copy.source_start, piece.copy.shape)


def narrow(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The box of `shape` from `start` on, as a view."""
    for dimension, (begin, length) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dimension, begin, length)
    return tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data


def _spans(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same copies, those that follow each other in both memories joined."""
    spans: list[tuple[torch.Tensor, torch.Tensor]] = []
    for destination, source in pairs:
        if spans and _follows(spans[-1][0], destination) and _follows(spans[-1][1], source):
            spans[-1] = _join(spans[-1][0], destination), _join(spans[-1][1], source)
        elif destination.is_contiguous() and source.is_contiguous():
            spans.append((destination.view(-1), source.view(-1)))
        else:
            spans.append((destination, source))
    return spans


def _blocks(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[_Block]:
    """The same copies in blocks of about BLOCK_BYTES: small neighbours joined, large pieces cut."""
    blocks: list[_Block] = []
    for index, (destination, source) in enumerate(pairs):
        if not (destination.is_contiguous() and source.is_contiguous()):
            blocks.append(_Block(destination, source, [(index, destination)]))
            continue
        flat_destination, flat_source = destination.view(-1), source.view(-1)
        step = max(BLOCK_BYTES // destination.element_size(), 1)
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and last.destination.nbytes + destination.nbytes <= BLOCK_BYTES
            and _follows(last.destination, flat_destination)
            and _follows(last.source, flat_source)
        ):
            last.destination, last.source = _join(last.destination, flat_destination), _join(last.source, flat_source)
            last.pieces.append((index, flat_destination))
            continue
        for to, of in zip(flat_destination.split(step), flat_source.split(step), strict=True):
            blocks.append(_Block(to, of, [(index, to)]))
    return blocks


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.ndim == 1
        and first.dtype == second.dtype
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.data_ptr() + first.nbytes == second.data_ptr()
    )


def _join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first.as_strided((first.numel() + second.numel(),), (1,))
