"""Plan a transfer: which rank copies which box of which tensor where. Pure geometry, computed once.

Invariant: every element of every destination shard is written exactly once, from a rank that holds it, and no tensor of
the source is left behind. The work is done once per distinct geometry, not once per tensor.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from transport.layout import Box, Layout, Placement, Shard


class PlanError(ValueError):
    """The source cannot fill the destination; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Read `shape` elements from `source_start` of a source rank's storage; write them at `destination_start`, cast to
    the destination's `dtype`."""

    tensor: str
    source_rank: int
    source_storage: str
    source_start: tuple[int, ...]
    destination_rank: int
    destination_storage: str
    destination_start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Move:
    """A Copy without its names: what all tensors of one geometry have in common."""

    source_start: tuple[int, ...]
    destination_start: tuple[int, ...]
    shape: tuple[int, ...]


Moves = dict[tuple[int, int], list[Move]]
"""(source rank, destination rank) -> the moves between them."""


class Plan:
    """Every copy of a transfer, in the order of the destination's layout."""

    def __init__(self, transfers: list[tuple[Placement, Placement, Moves]]) -> None:
        self._transfers = transfers

    def pairs(self) -> set[tuple[int, int]]:
        """(source rank, destination rank) of every two that have something to copy."""
        return {pair for moves in {id(moves): moves for _, _, moves in self._transfers}.values() for pair in moves}

    def copies(self, source_rank: int, destination_rank: int) -> Iterator[Copy]:
        """What goes from one rank to another, in order."""
        pair = (source_rank, destination_rank)
        for source, destination, moves in self._transfers:
            for move in moves.get(pair, ()):
                yield Copy(
                    source.tensor, source_rank, source.storage, move.source_start, destination_rank,
                    destination.storage, move.destination_start, move.shape, destination.dtype,
                )  # fmt: skip


def plan_transfer(source: Layout, destination: Layout) -> Plan:
    """Copies that fill every destination shard from the source.

    Where several source ranks hold the same elements (replicas), a tensor is taken from the rank with the fewest
    elements to send so far, and the shards of one tensor from the ranks after it in turn.

    Raises:
        PlanError: a destination tensor is unknown to the source, has another shape there, or is not fully covered; or
            a source tensor has no place in the destination.
    """
    held: dict[str, Placement] = {}
    for placement in source:
        other = held.setdefault(placement.tensor, placement)
        assert other is placement, f"{placement.tensor}: {other.dtype} on one train rank, {placement.dtype} on another"
    _check_tensors(held, destination)
    known: dict[tuple[int, int, int], tuple[Moves, dict[int, int]]] = {}
    load: dict[int, int] = defaultdict(int)
    transfers = []
    for wanted in destination:
        holder = held[wanted.tensor]
        first = _least_loaded(holder, load)
        key = (id(holder.shards), id(wanted.shards), first)
        if key not in known:
            moves = _moves(holder, wanted, first)
            known[key] = moves, _elements_by_source(moves)
        moves, sent = known[key]
        for rank, elements in sent.items():
            load[rank] += elements
        transfers.append((holder, wanted, moves))
    return Plan(transfers)


def _check_tensors(held: dict[str, Placement], destination: Layout) -> None:
    for wanted in destination:
        if wanted.tensor not in held:
            raise PlanError(f"{wanted.storage}: the trainer has no tensor {wanted.tensor}")
        ours, theirs = held[wanted.tensor].shape, wanted.shape
        if ours != theirs:
            raise PlanError(f"{wanted.tensor}: shape {ours} in the trainer, {theirs} in the engine")
    lost = held.keys() - {wanted.tensor for wanted in destination}
    if lost and destination:
        raise PlanError(f"{min(lost)}: the engine has no such tensor, so a refit would lose it")


def _least_loaded(holder: Placement, load: dict[int, int]) -> int:
    """Index of the shard to begin with; 0 if nothing is held twice, for then there is no choice."""
    if sum(shard.box.size for shard in holder.shards) <= math.prod(holder.shape):
        return 0
    return min(range(len(holder.shards)), key=lambda index: load[holder.shards[index].rank])


def _moves(holder: Placement, wanted: Placement, first: int) -> Moves:
    moves: Moves = defaultdict(list)
    num = len(holder.shards)
    for turn, shard in enumerate(wanted.shards):
        begin = (first + turn) % num if num else 0
        in_turn = [*holder.shards[begin:], *holder.shards[:begin]]
        for source_rank, move in _fill(wanted.tensor, shard, in_turn):
            moves[source_rank, shard.rank].append(move)
    return dict(moves)


def _fill(tensor: str, wanted: Shard, held: list[Shard]) -> list[tuple[int, Move]]:
    """Moves for one destination shard; what several ranks hold is taken from the first of them."""
    filled, missing = [], [wanted.box] if wanted.box.size > 0 else []
    for shard in held:
        if not missing:
            break
        left = []
        for box in missing:
            common = box.intersect(shard.box)
            if common is None:
                left.append(box)
                continue
            left += box.subtract(common)
            filled.append((shard.rank, Move(_place(shard, common), _place(wanted, common), common.shape)))
        missing = left
    if missing:
        covered = wanted.box.size - sum(box.size for box in missing)
        raise PlanError(f"{tensor}: {covered} of {wanted.box.size} elements are held by a train rank")
    return filled


def _elements_by_source(moves: Moves) -> dict[int, int]:
    sent: dict[int, int] = defaultdict(int)
    for (source_rank, _), some in moves.items():
        sent[source_rank] += sum(math.prod(move.shape) for move in some)
    return dict(sent)


def _place(shard: Shard, box: Box) -> tuple[int, ...]:
    """Where a global box begins in the shard's storage."""
    return tuple(o + b - s for o, b, s in zip(shard.offset, box.start, shard.box.start, strict=True))
