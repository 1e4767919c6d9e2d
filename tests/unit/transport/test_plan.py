import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.layout import Box, Layout, Placement, Shard, merge, share
from transport.plan import Copy, Plan, PlanError, plan_transfer

NOBODY = -1.0
Shape = tuple[int, ...]
Storages = dict[tuple[int, str], np.ndarray]


def placed(tensor: str, shape: Shape, *shards: Shard, storage: str = "", dtype: str = "float32") -> Placement:
    return Placement(tensor, shape, storage or tensor, dtype, shards)


def whole(shape: Shape, rank: int = 0, row: int = 0) -> Shard:
    """All of a tensor, from `row` of its storage on."""
    return Shard(rank, Box((0,) * len(shape), shape), (row,) + (0,) * (len(shape) - 1))


def rows(start: int, num: int, rank: int) -> Shard:
    """Rows of a vector, alone in their storage."""
    return Shard(rank, Box((start,), (num,)), (0,))


def region(start: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + length) for begin, length in zip(start, shape, strict=True))


def placed_shards(layout: Layout) -> list[tuple[Placement, Shard]]:
    return [(placement, shard) for placement in layout for shard in placement.shards]


def allocate(layout: Layout) -> Storages:
    """Storages just large enough for their shards, filled with a value that no tensor has."""
    sizes: dict[tuple[int, str], list[int]] = {}
    for placement, shard in placed_shards(layout):
        size = sizes.setdefault((shard.rank, placement.storage), [0] * len(shard.offset))
        for dimension, (offset, length) in enumerate(zip(shard.offset, shard.box.shape, strict=True)):
            size[dimension] = max(size[dimension], offset + length)
    return {key: np.full(size, NOBODY) for key, size in sizes.items()}


def copies_of(plan: Plan) -> list[Copy]:
    return [copy for pair in sorted(plan.pairs()) for copy in plan.copies(*pair)]


def carry_out(
    copies: list[Copy], source: Layout, destination: Layout
) -> tuple[Storages, Storages, dict[str, np.ndarray]]:
    """Fill the source, do the copies. Returns what landed, how often each element was written, and the tensors."""
    tensors, first = {}, 0.0
    for placement in source:
        values = np.arange(np.prod(placement.shape, dtype=int), dtype=float).reshape(placement.shape)
        tensors[placement.tensor] = values + first
        first += values.size
    held = allocate(source)
    for placement, shard in placed_shards(source):
        values = tensors[placement.tensor][region(shard.box.start, shard.box.shape)]
        held[shard.rank, placement.storage][region(shard.offset, shard.box.shape)] = values
    landed = allocate(destination)
    writes = {key: np.zeros(array.shape, dtype=int) for key, array in landed.items()}
    for copy in copies:
        target = region(copy.destination_start, copy.shape)
        sent = held[copy.source_rank, copy.source_storage][region(copy.source_start, copy.shape)]
        landed[copy.destination_rank, copy.destination_storage][target] = sent
        writes[copy.destination_rank, copy.destination_storage][target] += 1
    return landed, writes, tensors


def check_arrival(source: Layout, destination: Layout) -> list[Copy]:
    """Every element of every destination shard is written once, with its own value, and nothing else is written."""
    copies = copies_of(plan_transfer(source, destination))
    landed, writes, tensors = carry_out(copies, source, destination)
    for placement, shard in placed_shards(destination):
        key, place = (shard.rank, placement.storage), region(shard.offset, shard.box.shape)
        np.testing.assert_array_equal(
            landed[key][place], tensors[placement.tensor][region(shard.box.start, shard.box.shape)]
        )
        assert (writes[key][place] == 1).all()
        writes[key][place] = 0
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
    placements = []
    replicas = draw(st.integers(1, max_replicas))
    for name, shape in shapes.items():
        boxes = draw(pieces(shape))
        shards = [
            Shard(replica * 16 + index, box, tuple(draw(st.integers(0, 2)) for _ in shape))
            for replica in range(replicas)
            for index, box in enumerate(boxes)
        ]
        placements.append(placed(name, shape, *draw(st.permutations(shards))))
    return share(placements)


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
    source = [placed("w", (7,), rows(0, 4, rank=0), rows(4, 3, rank=1))]
    destination = [placed("w", (7,), rows(0, 5, rank=0), rows(5, 2, rank=1), dtype="bfloat16")]
    assert check_arrival(source, destination) == [
        Copy("w", 0, "w", (0,), 0, "w", (0,), (4,), "bfloat16"),
        Copy("w", 1, "w", (0,), 0, "w", (4,), (1,), "bfloat16"),
        Copy("w", 1, "w", (1,), 1, "w", (0,), (2,), "bfloat16"),
    ]


def test_a_pair_that_shares_nothing_has_no_copies():
    # Rows 0-3 of train rank 0 go to engine rank 0 alone, rows 4-6 of train rank 1 to both.
    source = [placed("w", (7,), rows(0, 4, rank=0), rows(4, 3, rank=1))]
    plan = plan_transfer(source, [placed("w", (7,), rows(0, 5, rank=0), rows(5, 2, rank=1))])
    assert plan.pairs() == {(0, 0), (1, 0), (1, 1)}
    assert list(plan.copies(0, 1)) == []


def test_copies_come_in_the_order_of_the_engine():
    source = [placed(name, (2,), whole((2,))) for name in "abc"]
    plan = plan_transfer(source, [placed(name, (2,), whole((2,))) for name in "cab"])
    assert [copy.tensor for copy in plan.copies(0, 0)] == ["c", "a", "b"]


def test_two_tensors_land_one_below_the_other_in_a_fused_storage():
    source = [placed("k", (2, 3), whole((2, 3))), placed("q", (4, 3), whole((4, 3)))]
    fused = [placed("q", (4, 3), whole((4, 3)), storage="qk"), placed("k", (2, 3), whole((2, 3), row=4), storage="qk")]
    copies = check_arrival(source, fused)
    assert [(copy.source_storage, copy.destination_start) for copy in copies] == [("q", (0, 0)), ("k", (4, 0))]


def test_two_engines_may_want_one_storage_in_two_dtypes():
    source = [placed("w", (4,), whole((4,)))]
    dtypes = ("float32", "bfloat16")
    wanted = merge([placed("w", (4,), whole((4,), rank), dtype=dtype)] for rank, dtype in enumerate(dtypes))
    copies = check_arrival(source, wanted)
    assert [(copy.destination_rank, copy.dtype) for copy in copies] == [(0, "float32"), (1, "bfloat16")]


def test_a_tensor_wanted_in_two_storages_and_dtypes_arrives_in_both():
    source = [placed("embed", (4,), whole((4,)))]
    wanted = [placed("embed", (4,), whole((4,))),
              placed("embed", (4,), whole((4,)), storage="head", dtype="bfloat16")]  # fmt: skip
    copies = check_arrival(source, wanted)
    assert [(copy.destination_storage, copy.dtype) for copy in copies] == [("embed", "float32"), ("head", "bfloat16")]


def test_an_engine_may_want_a_part_only():
    source = [placed("w", (6,), rows(0, 3, rank=0), rows(3, 3, rank=1))]
    (copy,) = check_arrival(source, [placed("w", (6,), rows(4, 2, rank=0))])
    assert (copy.source_rank, copy.source_start, copy.shape) == (1, (1,), (2,))


def test_an_engine_rank_that_holds_only_padding_of_a_tensor_gets_nothing_of_it():
    source = [placed("w", (4,), whole((4,)))]
    copies = check_arrival(source, [placed("w", (4,), whole((4,)), Shard(1, Box((4,), (0,)), (0,)))])
    assert [copy.destination_rank for copy in copies] == [0]


def test_an_unknown_tensor_is_refused_by_name():
    with pytest.raises(PlanError, match=r"^head: the trainer has no tensor b$"):
        plan_transfer([placed("a", (2,), whole((2,)))], [placed("b", (2,), whole((2,)), storage="head")])


def test_a_tensor_of_another_shape_is_refused_by_name():
    with pytest.raises(PlanError, match=r"^a: shape \(2, 3\) in the trainer, \(3, 2\) in the engine$"):
        plan_transfer([placed("a", (2, 3), whole((2, 3)))], [placed("a", (3, 2), whole((3, 2)))])


def test_a_tensor_that_the_engine_lacks_is_refused_by_name():
    source = [placed(name, (2,), whole((2,))) for name in "abc"]
    with pytest.raises(PlanError, match=r"^b: the engine has no such tensor"):
        plan_transfer(source, [placed("a", (2,), whole((2,)))])


def test_train_ranks_that_disagree_on_a_dtype_have_no_plan():
    source = [placed("a", (6,), rows(0, 3, 0)), placed("a", (6,), rows(3, 3, 1), dtype="bfloat16")]
    with pytest.raises(AssertionError, match=r"^a: float32 on one train rank, bfloat16 on another"):
        plan_transfer(source, [placed("a", (6,), whole((6,)))])


def test_a_hole_is_refused_by_name():
    source = [placed("a", (6,), rows(0, 2, rank=0), rows(3, 3, rank=1))]
    with pytest.raises(PlanError, match=r"^a: 5 of 6 elements are held"):
        plan_transfer(source, [placed("a", (6,), whole((6,)))])


def test_a_tensor_that_nobody_holds_is_refused_by_name():
    with pytest.raises(PlanError, match=r"^a: 0 of 6 elements are held"):
        plan_transfer([placed("a", (6,))], [placed("a", (6,), whole((6,)))])


def test_an_overlap_does_not_make_up_for_a_hole():
    source = [placed("a", (4,), rows(0, 2, rank=0), rows(1, 2, rank=1))]
    with pytest.raises(PlanError, match="a: 3 of 4 elements"):
        plan_transfer(source, [placed("a", (4,), whole((4,)))])


@given(both_sides(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_piece_missing_on_every_replica_is_always_refused(sides: tuple[Layout, Layout], data: st.DataObject):
    source, destination = sides
    lost = data.draw(st.sampled_from(source))
    box = data.draw(st.sampled_from(lost.shards)).box
    kept = [
        placed(p.tensor, p.shape, *(s for s in p.shards if p.tensor != lost.tensor or s.box != box)) for p in source
    ]
    with pytest.raises(PlanError, match=f"^{lost.tensor}: "):
        plan_transfer(kept, destination)


def sent_by_rank(copies: list[Copy]) -> Counter[int]:
    sent: Counter[int] = Counter()
    for copy in copies:
        sent[copy.source_rank] += int(np.prod(copy.shape))
    return sent


def test_two_replicas_send_half_each():
    source = share([placed(name, (4,), whole((4,), 0), whole((4,), 1)) for name in "abcd"])
    destination = share([placed(name, (4,), whole((4,))) for name in "abcd"])
    assert sent_by_rank(check_arrival(source, destination)) == {0: 8, 1: 8}


def test_two_shards_on_two_replicas_make_four_senders():
    # HSDP: ranks 0 and 2 hold rows 0-1, ranks 1 and 3 rows 2-3. Two tensors of 4 rows each: 2 rows from every rank.
    shards = (rows(0, 2, 0), rows(2, 2, 1), rows(0, 2, 2), rows(2, 2, 3))
    source = share([placed(name, (4,), *shards) for name in "ab"])
    copies = check_arrival(source, share([placed(name, (4,), whole((4,))) for name in "ab"]))
    assert sent_by_rank(copies) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_four_engine_ranks_that_want_all_of_a_tensor_get_it_from_four_replicas():
    source = [placed("w", (8,), *(whole((8,), rank) for rank in range(4)))]
    copies = check_arrival(source, [placed("w", (8,), *(whole((8,), rank) for rank in range(4)))])
    assert sent_by_rank(copies) == {0: 8, 1: 8, 2: 8, 3: 8}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_replicas_differ_by_no_more_than_the_largest_tensor(sizes: list[int], replicas: int):
    shapes: dict[str, Shape] = {f"w{index}": (size,) for index, size in enumerate(sizes)}
    ranks = range(replicas)
    source = share([placed(name, shape, *(whole(shape, rank) for rank in ranks)) for name, shape in shapes.items()])
    copies = check_arrival(source, share([placed(name, shape, whole(shape)) for name, shape in shapes.items()]))
    sent = sent_by_rank(copies)
    assert max(sent[rank] for rank in ranks) - min(sent[rank] for rank in ranks) <= max(sizes)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_thousand_tensors_of_one_geometry_take_no_more_work_than_four(replicas: int, monkeypatch: pytest.MonkeyPatch):
    """The plan's work is counted in intersections of boxes."""
    intersect, calls = Box.intersect, 0

    def counted(self: Box, other: Box) -> Box | None:
        nonlocal calls
        calls += 1
        return intersect(self, other)

    def ranks(kind: str, num_tensors: int, num: int, copies: int = 1) -> Layout:
        """Every tensor's 12 rows over `num` ranks, as they would describe them, one by one."""
        described = [
            share([placed(f"{kind}{index}", (12,), rows(rank % num * 12 // num, 12 // num, rank))
                   for index in range(num_tensors)])
            for rank in range(num * copies)
        ]  # fmt: skip
        return merge(described)

    def intersections(num_tensors: int) -> int:
        nonlocal calls
        calls = 0
        plan = plan_transfer(ranks("w", num_tensors, num=2, copies=replicas), ranks("w", num_tensors, num=3))
        assert sum(np.prod(copy.shape) for copy in copies_of(plan)) == 12 * num_tensors
        return calls

    monkeypatch.setattr(Box, "intersect", counted)
    few: Any = intersections(4)
    assert few > 0
    assert intersections(1000) == few
