import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.layout import Box, Layout, Shard, merge


def indices(box: Box) -> set[tuple[int, ...]]:
    ranges = (range(begin, begin + length) for begin, length in zip(box.start, box.shape, strict=True))
    return set(itertools.product(*ranges))


def boxes(dimensions: int) -> st.SearchStrategy[Box]:
    start = st.tuples(*[st.integers(0, 4)] * dimensions)
    return st.builds(Box, start, st.tuples(*[st.integers(0, 4)] * dimensions))


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


def test_a_merged_layout_has_the_shards_of_every_rank_in_order():
    first = Layout({"w": (4,)}, [Shard("w", Box((0,), (3,)), 0, "w", (0,))], {"w": "float32"})
    second = Layout(
        {"w": (4,), "b": (2,)}, [Shard("w", Box((3,), (1,)), 1, "w", (0,))], {"w": "float32", "b": "bfloat16"}
    )
    merged = merge([first, second])
    assert merged.shapes == {"w": (4,), "b": (2,)}
    assert [shard.rank for shard in merged] == [0, 1]
    assert merged.dtypes == {"w": "float32", "b": "bfloat16"}


def test_ranks_that_disagree_on_a_shape_are_not_merged():
    with pytest.raises(AssertionError, match=r"w: \(4,\) on one rank, \(5,\) on another"):
        merge([Layout({"w": (4,)}, [], {}), Layout({"w": (5,)}, [], {})])
