import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.layout import Box, Layout, Shard
from transport.plan import Copy, PlanError, plan_transfer

NOBODY = -1.0
Shape = tuple[int, ...]
Storages = dict[tuple[int, str], np.ndarray]


def whole(name: str, shape: Shape, rank: int = 0) -> Shard:
    return Shard(name, Box((0,) * len(shape), shape), rank, name, (0,) * len(shape))


def rows(name: str, start: int, num: int, rank: int) -> Shard:
    """Rows of a vector, alone in their storage."""
    return Shard(name, Box((start,), (num,)), rank, name, (0,))


def layout(shapes: dict[str, Shape], shards: list[Shard]) -> Layout:
    return Layout(shapes, shards, {shard.storage: "float32" for shard in shards})


def region(start: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))


def allocate(shards: list[Shard]) -> Storages:
    """Storages just large enough for their shards, filled with a value that no tensor has."""
    sizes: dict[tuple[int, str], list[int]] = {}
    for shard in shards:
        size = sizes.setdefault((shard.rank, shard.storage), [0] * len(shard.offset))
        for dimension, (offset, length) in enumerate(zip(shard.offset, shard.box.shape, strict=True)):
            size[dimension] = max(size[dimension], offset + length)
    return {key: np.full(size, NOBODY) for key, size in sizes.items()}


def carry_out(
    copies: list[Copy], source: Layout, destination: Layout
) -> tuple[Storages, Storages, dict[str, np.ndarray]]:
    """Fill the source, do the copies. Returns what landed, how often each element was written, and the tensors."""
    tensors, first = {}, 0.0
    for name, shape in source.shapes.items():
        tensors[name] = np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape) + first
        first += tensors[name].size
    held = allocate(source.shards)
    for shard in source:
        values = tensors[shard.tensor][region(shard.box.start, shard.box.shape)]
        held[shard.rank, shard.storage][region(shard.offset, shard.box.shape)] = values
    landed = allocate(destination.shards)
    writes = {key: np.zeros(array.shape, dtype=int) for key, array in landed.items()}
    for copy in copies:
        target = region(copy.destination_start, copy.shape)
        sent = held[copy.source_rank, copy.source_storage][region(copy.source_start, copy.shape)]
        landed[copy.destination_rank, copy.destination_storage][target] = sent
        writes[copy.destination_rank, copy.destination_storage][target] += 1
    return landed, writes, tensors


def check_arrival(source: Layout, destination: Layout) -> list[Copy]:
    """Every element of every destination shard is written once, with its own value, and nothing else is written."""
    copies = plan_transfer(source, destination)
    landed, writes, tensors = carry_out(copies, source, destination)
    for shard in destination:
        place = region(shard.offset, shard.box.shape)
        expected = tensors[shard.tensor][region(shard.box.start, shard.box.shape)]
        np.testing.assert_array_equal(landed[shard.rank, shard.storage][place], expected)
        assert (writes[shard.rank, shard.storage][place] == 1).all()
        writes[shard.rank, shard.storage][place] = 0
    assert not any(array.any() for array in writes.values())
    return copies


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Consecutive pieces (start, length) of a dimension, uneven, none of them empty."""
    inner = draw(st.lists(st.integers(1, length - 1), unique=True, max_size=3)) if length > 1 else []
    bounds = [0, *sorted(inner), length]
    return [(low, high - low) for low, high in itertools.pairwise(bounds)]


@st.composite
def pieces(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """A tensor cut along dimension 0 and perhaps 1."""
    boxes = [Box((0,) * len(shape), shape)]
    for dimension in range(draw(st.integers(0, min(2, len(shape))))):
        parts = draw(cuts(shape[dimension]))
        boxes = [
            Box(
                (*box.start[:dimension], start, *box.start[dimension + 1 :]),
                (*box.shape[:dimension], length, *box.shape[dimension + 1 :]),
            )
            for box in boxes
            for start, length in parts
        ]
    return boxes


@st.composite
def held_by(draw: st.DrawFn, shapes: dict[str, Shape], max_replicas: int) -> Layout:
    """Every tensor in pieces over ranks, all of it once per replica, each shard somewhere inside its storage."""
    shards = []
    replicas = draw(st.integers(1, max_replicas))
    for name, shape in shapes.items():
        boxes = draw(pieces(shape))
        for replica in range(replicas):
            for index, box in enumerate(boxes):
                offset = tuple(draw(st.integers(0, 2)) for _ in shape)
                shards.append(Shard(name, box, replica * 16 + index, name, offset))
    return layout(shapes, draw(st.permutations(shards)))


@st.composite
def both_sides(draw: st.DrawFn) -> tuple[Layout, Layout]:
    sizes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
    shapes = draw(st.dictionaries(st.sampled_from("abc"), sizes, min_size=1, max_size=3))
    return draw(held_by(shapes, max_replicas=3)), draw(held_by(shapes, max_replicas=2))


@given(both_sides())
@settings(max_examples=150, deadline=None)
def test_every_element_is_written_exactly_once_with_its_own_value(sides: tuple[Layout, Layout]):
    check_arrival(*sides)


def test_uneven_rows_of_two_train_ranks_fill_an_engine_cut_elsewhere():
    source = layout({"w": (7,)}, [rows("w", 0, 4, rank=0), rows("w", 4, 3, rank=1)])
    destination = layout({"w": (7,)}, [rows("w", 0, 5, rank=0), rows("w", 5, 2, rank=1)])
    assert check_arrival(source, destination) == [
        Copy(0, "w", (0,), 0, "w", (0,), (4,)),
        Copy(1, "w", (0,), 0, "w", (4,), (1,)),
        Copy(1, "w", (1,), 1, "w", (0,), (2,)),
    ]


def test_two_tensors_land_one_below_the_other_in_a_fused_storage():
    source = layout({"k": (2, 3), "q": (4, 3)}, [whole("k", (2, 3)), whole("q", (4, 3))])
    fused = [Shard("q", Box((0, 0), (4, 3)), 0, "qk", (0, 0)), Shard("k", Box((0, 0), (2, 3)), 0, "qk", (4, 0))]
    copies = check_arrival(source, Layout(source.shapes, fused, {"qk": "float32"}))
    assert [(copy.source_storage, copy.destination_start) for copy in copies] == [("q", (0, 0)), ("k", (4, 0))]


def test_an_engine_may_want_a_part_only():
    source = layout({"w": (6,)}, [rows("w", 0, 3, rank=0), rows("w", 3, 3, rank=1)])
    (copy,) = check_arrival(source, layout({"w": (6,)}, [rows("w", 4, 2, rank=0)]))
    assert (copy.source_rank, copy.source_start, copy.shape) == (1, (1,), (2,))


def test_an_unknown_tensor_is_refused_by_name():
    with pytest.raises(PlanError, match="the trainer has no tensor b"):
        plan_transfer(layout({"a": (2,)}, [whole("a", (2,))]), layout({"b": (2,)}, [whole("b", (2,))]))


def test_a_tensor_of_another_shape_is_refused_by_name():
    with pytest.raises(PlanError, match=r"a: shape \(2, 3\) in the trainer, \(3, 2\) in the engine"):
        plan_transfer(layout({"a": (2, 3)}, [whole("a", (2, 3))]), layout({"a": (3, 2)}, [whole("a", (3, 2))]))


def test_a_hole_is_refused_by_name():
    source = layout({"a": (6,)}, [rows("a", 0, 2, rank=0), rows("a", 3, 3, rank=1)])
    with pytest.raises(PlanError, match="a: 5 of 6 elements"):
        plan_transfer(source, layout({"a": (6,)}, [whole("a", (6,))]))


def test_a_tensor_that_nobody_holds_is_refused_by_name():
    with pytest.raises(PlanError, match="a: 0 of 6 elements"):
        plan_transfer(layout({"a": (6,)}, []), layout({"a": (6,)}, [whole("a", (6,))]))


def test_an_overlap_does_not_make_up_for_a_hole():
    source = layout({"a": (4,)}, [rows("a", 0, 2, rank=0), rows("a", 1, 2, rank=1)])
    with pytest.raises(PlanError):
        plan_transfer(source, layout({"a": (4,)}, [whole("a", (4,))]))


@given(both_sides(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_piece_missing_on_every_replica_is_always_refused(sides: tuple[Layout, Layout], data: st.DataObject):
    source, destination = sides
    lost = data.draw(st.sampled_from(source.shards))
    kept = [shard for shard in source if (shard.tensor, shard.box) != (lost.tensor, lost.box)]
    with pytest.raises(PlanError, match=f"^{lost.tensor}: "):
        plan_transfer(Layout(source.shapes, kept, source.dtypes), destination)


def sent_by_rank(copies: list[Copy]) -> Counter[int]:
    sent: Counter[int] = Counter()
    for copy in copies:
        sent[copy.source_rank] += int(np.prod(copy.shape))
    return sent


def test_two_replicas_send_half_each():
    names = ["a", "b", "c", "d"]
    source = layout(dict.fromkeys(names, (4,)), [whole(name, (4,), rank) for name in names for rank in (0, 1)])
    destination = layout(source.shapes, [whole(name, (4,)) for name in names])
    assert sent_by_rank(check_arrival(source, destination)) == {0: 8, 1: 8}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_replicas_differ_by_no_more_than_the_largest_tensor(sizes: list[int], replicas: int):
    shapes: dict[str, Shape] = {f"w{index}": (size,) for index, size in enumerate(sizes)}
    ranks = range(replicas)
    source = layout(shapes, [whole(name, shape, rank) for name, shape in shapes.items() for rank in ranks])
    copies = check_arrival(source, layout(shapes, [whole(name, shape) for name, shape in shapes.items()]))
    sent = sent_by_rank(copies)
    assert max(sent[rank] for rank in ranks) - min(sent[rank] for rank in ranks) <= max(sizes)
