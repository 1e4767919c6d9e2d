"""Writing a Region's pieces into a buffer and reading them back, everything prepared once.

`Packer` belongs to the train rank: one pass casts its shards to the engine's dtype and, where a refit is verified,
takes each piece's digest while the bytes are still in the cache. `Unpacker` belongs to the engine rank: it takes the
digests again where the bytes have landed, and gives the pieces as views. Neighbours in both memories are cast as one,
so the cost follows the bytes and not the number of tensors.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from transport.arena import Piece, Region
from transport.mirror import mirror
from transport.receipt import check_digests, check_version, digest, withdraw_receipt, write_receipt
from transport.team import deal, run_together, team_size

BLOCK_BYTES = 1 << 20
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


Pair = tuple[torch.Tensor, torch.Tensor]
"""(destination, source), equal in shape."""


class FusedCopy:
    """Copies of tensors into others, prepared once: casts, and takes each destination's digest behind the cast.

    Keeps the tensors, so that their memory lives as long as it does. The process's team shares the work.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self._written = [destination for destination, _ in pairs]
        self._cuda = next((destination.device for destination in self._written if destination.is_cuda), None)
        if self._cuda is not None:  # one stream does not get faster by threads, and each has a stream of its own
            mirror()
            self._hands, self._blocks = [_spans(pairs)], list[list[_Block]]()
        else:
            self._hands, self._blocks = _share_spans(_spans(pairs)), _share_blocks(_blocks(pairs))

    @torch.no_grad()
    def run(self, verify: bool) -> tuple[list[bytes], float]:
        """Copy all. Returns each destination's digest, none without `verify`, and the seconds that digests took."""
        if verify and self._cuda is None:
            return self._run_blocks()
        run_together([functools.partial(_copy_spans, hand) for hand in self._hands])
        if self._cuda is not None:
            # Who reads next may be another process. Other streams may be stuck in a broadcast: they are not waited for.
            torch.cuda.current_stream(self._cuda).synchronize()
        copied = time.perf_counter()
        digests = mirror().digests(self._written) if verify else []
        return digests, time.perf_counter() - copied

    def _run_blocks(self) -> tuple[list[bytes], float]:
        sizes = [destination.numel() for destination in self._written]
        parts = run_together([functools.partial(_copy_blocks, blocks, sizes) for blocks in self._blocks])
        digests = {index: one for part, _ in parts for index, one in part.items()}
        return [digests[index] for index in range(len(sizes))], max((spent for _, spent in parts), default=0.0)


@torch.no_grad()
def _copy_spans(spans: list[Pair]) -> None:
    plain = [(d, s) for d, s in spans if not _is_memcpy(d, s)]
    if plain:
        torch._foreach_copy_([d for d, _ in plain], [s for _, s in plain])
    for destination, source in spans:
        if _is_memcpy(destination, source):
            _memcpy(destination, source)


@torch.no_grad()
def _copy_blocks(blocks: list[_Block], sizes: list[int]) -> tuple[dict[int, bytes], float]:
    """Digests by piece, and the seconds that they took."""
    hashers: dict[int, xxhash.xxh3_128] = {}
    digests: dict[int, bytes] = {}
    digest_s = 0.0
    for block in blocks:
        if _is_memcpy(block.destination, block.source):
            _memcpy(block.destination, block.source)
        else:
            block.destination.copy_(block.source)
        begin = time.perf_counter()
        for index, part in block.pieces:
            if part.numel() == sizes[index]:
                digests[index] = digest(_bytes(part))
                continue
            hashers.setdefault(index, xxhash.xxh3_128()).update(_bytes(part))
        digest_s += time.perf_counter() - begin
    return digests | {index: hasher.digest() for index, hasher in hashers.items()}, digest_s


def _digests(tensors: list[torch.Tensor]) -> list[bytes]:
    return [digest(_bytes(tensor)) for tensor in tensors]


def digests_of(tensors: list[torch.Tensor]) -> list[bytes]:
    """The digest of each tensor's bytes, by the whole team where they are on the host."""
    if tensors and tensors[0].is_cuda:
        return mirror().digests(tensors)
    hands = deal([float(tensor.nbytes) for tensor in tensors], team_size())
    jobs = [functools.partial(_digests, [tensors[i] for i in hand]) for hand in hands]
    found = {
        i: one for hand, part in zip(hands, run_together(jobs), strict=True) for i, one in zip(hand, part, strict=True)
    }
    return [found[index] for index in range(len(tensors))]


class Packer:
    """Writes one region. Keeps views of `flat` and of `sources`: both live as long as it does.

    Args:
        sources: this rank's storage of each tensor, its local shard.
    """

    def __init__(self, region: Region, flat: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
        self._region, self.flat = region, flat
        self._copy = FusedCopy([(piece.view(flat), source_view(piece, sources)) for piece in region.pieces])

    def write(self, version: int, verify: bool) -> Packed:
        """Cast every piece into the buffer and write the receipt."""
        start = time.perf_counter()
        withdraw_receipt(self.flat, self._region)
        digests, digest_s = self._copy.run(verify)
        seal = write_receipt(self.flat, self._region, version, b"".join(digests))
        return Packed(seal if verify else None, time.perf_counter() - start - digest_s, digest_s)


class Unpacker:
    """Reads one region from `flat`, where it has landed."""

    def __init__(self, region: Region, flat: torch.Tensor) -> None:
        self._region, self.flat = region, flat
        self.views = [piece.view(flat) for piece in region.pieces]
        if flat.is_cuda:
            mirror()

    def check(self, version: int, seal: bytes | None) -> None:
        """Raises VerificationError unless this is `version`, and (with a seal) unless every digest agrees."""
        check_version(self.flat, self._region, version)
        if seal is not None:
            check_digests(self.flat, self._region, version, seal, digests_of(self.views))


def source_view(piece: Piece, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The piece in the local shard that it comes from."""
    return narrow(sources[piece.copy.source_storage], piece.copy.source_start, piece.copy.shape)


def narrow(tensor: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The box of `shape` from `start` on, as a view."""
    for dimension, (begin, length) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dimension, begin, length)
    return tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


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
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.data_ptr() + first.nbytes == second.data_ptr()
    )


def _join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first.as_strided((first.numel() + second.numel(),), (1,))


def _share_spans(spans: list[Pair]) -> list[list[Pair]]:
    """The spans in one list per member of the team, equal in bytes: long ones are cut."""
    size = team_size()
    most = max(sum(d.nbytes for d, _ in spans) // (4 * size), 1)
    cut: list[Pair] = []
    for destination, source in spans:
        if size > 1 and destination.ndim == 1 and destination.nbytes > most:
            step = -(-most // destination.element_size())
            cut += zip(destination.split(step), source.split(step), strict=True)
        else:
            cut.append((destination, source))
    return [[cut[i] for i in hand] for hand in deal([float(d.nbytes) for d, _ in cut], size)]


def _share_blocks(blocks: list[_Block]) -> list[list[_Block]]:
    """The blocks in one list per member of the team, about equal in bytes; those of one piece stay together."""
    runs: list[list[_Block]] = []
    for block in blocks:
        if runs and runs[-1][-1].pieces[-1][0] == block.pieces[0][0]:
            runs[-1].append(block)
        else:
            runs.append([block])
    hands = deal([float(sum(block.destination.nbytes for block in run)) for run in runs], team_size())
    return [[block for i in hand for block in runs[i]] for hand in hands]


def _is_memcpy(destination: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether plain bytes are moved on the CPU, for which NumPy takes memcpy: 0.7 of the time of torch's copy_."""
    return (
        destination.dtype == source.dtype
        and destination.device.type == source.device.type == "cpu"
        and destination.is_contiguous()
        and source.is_contiguous()
    )


def _memcpy(destination: torch.Tensor, source: torch.Tensor) -> None:
    np.copyto(destination.view(-1).view(torch.uint8).numpy(), source.view(-1).view(torch.uint8).numpy())
