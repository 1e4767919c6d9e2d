import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.layout import Box, Placement, Shard, merge, share


def indices(box: Box) -> set[tuple[int, ...]]:
    ranges = (range(begin, begin + length) for begin, length in zip(box.start, box.shape, strict=True))
    return set(itertools.product(*ranges))


def boxes(dimensions: int) -> st.SearchStrategy[Box]:
    start = st.tuples(*[st.integers(0, 4)] * dimensions)
    return st.builds(Box, start, st.tuples(*[st.integers(0, 4)] * dimensions))


@st.composite
def nested_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    """A box and one that lies within it."""
    outer = draw(st.integers(0, 3).flatmap(boxes))
    cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in outer.shape]
    start = tuple(begin + low for begin, (low, _) in zip(outer.start, cuts, strict=True))
    return outer, Box(start, tuple(high - low for low, high in cuts))


def test_a_box_of_3_by_4_has_12_indices_and_one_without_dimensions_has_1():
    assert Box((5, 0), (3, 4)).size == 12
    assert Box((5, 0), (0, 4)).size == 0
    assert Box((), ()).size == 1


def test_rows_2_to_5_and_rows_4_to_9_share_rows_4_and_5():
    assert Box((2, 0), (4, 8)).intersect(Box((4, 0), (6, 8))) == Box((4, 0), (2, 8))


def test_boxes_that_only_touch_share_nothing():
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None


@given(st.integers(0, 3).flatmap(lambda dimensions: st.tuples(boxes(dimensions), boxes(dimensions))))
def test_an_intersection_holds_exactly_the_indices_in_both(pair: tuple[Box, Box]):
    one, other = pair
    common = one.intersect(other)
    assert (indices(common) if common else set()) == indices(one) & indices(other)
    assert common == other.intersect(one)
    assert common is None or common.size == len(indices(common))


def test_boxes_of_different_dimensions_cannot_be_compared():
    with pytest.raises(ValueError, match="zip"):
        Box((0,), (4,)).intersect(Box((0, 0), (4, 4)))


def test_4_by_6_without_its_middle_is_two_rows_and_two_ends_of_rows():
    rest = Box((0, 0), (4, 6)).subtract(Box((1, 2), (2, 3)))
    assert rest == [Box((0, 0), (1, 6)), Box((3, 0), (1, 6)), Box((1, 0), (2, 2)), Box((1, 5), (2, 1))]


@given(nested_boxes())
def test_what_is_left_of_a_box_and_what_was_taken_make_the_box_without_overlap(pair: tuple[Box, Box]):
    outer, inner = pair
    parts = [indices(box) for box in [inner, *outer.subtract(inner)]]
    assert set().union(*parts) == indices(outer)
    assert sum(len(part) for part in parts) == outer.size


def placed(tensor: str, shape: tuple[int, ...], *shards: Shard, storage: str = "", dtype: str = "float32") -> Placement:
    return Placement(tensor, shape, storage or tensor, dtype, shards)


def rows(rank: int, start: int, num: int) -> Shard:
    return Shard(rank, Box((start,), (num,)), (0,))


def test_a_merged_layout_has_the_shards_of_every_rank_in_order():
    first = [placed("w", (4,), rows(0, 0, 3))]
    second = [placed("w", (4,), rows(1, 3, 1)), placed("b", (2,), rows(1, 0, 2), dtype="bfloat16")]
    assert merge([first, second]) == [
        placed("w", (4,), rows(0, 0, 3), rows(1, 3, 1)),
        placed("b", (2,), rows(1, 0, 2), dtype="bfloat16"),
    ]


def test_a_tensor_in_two_storages_stays_two_placements():
    head = placed("embed", (4,), rows(0, 0, 4), storage="head")
    assert merge([[placed("embed", (4,), rows(0, 0, 4)), head]]) == [placed("embed", (4,), rows(0, 0, 4)), head]


def test_ranks_that_disagree_on_a_shape_are_not_merged():
    with pytest.raises(AssertionError, match=r"^w: \(4,\) on one rank, \(5,\) on another"):
        merge([[placed("w", (4,), rows(0, 0, 4))], [placed("w", (5,), rows(1, 0, 5))]])


def test_a_tensor_that_ranks_keep_in_two_dtypes_stays_two_placements():
    first, second = placed("w", (4,), rows(0, 0, 4)), placed("w", (4,), rows(1, 0, 4), dtype="bfloat16")
    assert merge([[first], [second]]) == [first, second]


def test_equal_shards_become_one_object_and_stay_one_when_ranks_are_merged():
    # Two tensors of one geometry, a third of another, on two ranks: two distinct tuples of shards in the end.
    ranks = [
        share([placed("a", (4,), rows(rank, 2 * rank, 2)), placed("b", (4,), rows(rank, 2 * rank, 2)),
               placed("c", (6,), rows(rank, 3 * rank, 3))])
        for rank in (0, 1)
    ]  # fmt: skip
    assert ranks[0][0].shards is ranks[0][1].shards
    a, b, c = merge(ranks)
    assert a.shards is b.shards
    assert a.shards == (rows(0, 0, 2), rows(1, 2, 2))
    assert c.shards == (rows(0, 0, 3), rows(1, 3, 3))


def test_sharing_changes_nothing_else():
    layout = [placed("a", (4,), rows(0, 0, 4)), placed("b", (4,), rows(0, 0, 4), storage="ab", dtype="bfloat16")]
    assert share(layout) == layout
