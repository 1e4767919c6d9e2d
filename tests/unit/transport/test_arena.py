import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.arena import (
    ALIGNMENT_BYTES,
    DIGEST_BYTES,
    RECEIPT_HEADER_BYTES,
    Piece,
    Region,
    allocate,
    image,
    image_offsets,
    image_views,
    run,
)
from transport.layout import Box, Layout, Placement, Shard
from transport.plan import Copy, plan_transfer

CPU = torch.device("cpu")
DTYPES = st.sampled_from(["float32", "bfloat16"])
Parameters = dict[str, tuple[tuple[int, ...], str]]


def copy(shape: tuple[int, ...], dtype: str, storage: str = "w", start: tuple[int, ...] = (), rank: int = 0) -> Copy:
    origin = (0,) * len(shape)
    return Copy(storage, rank, storage, origin, 0, storage, start or origin, shape, dtype)


def test_a_run_is_back_to_back_at_multiples_of_64_bytes_with_its_receipt_behind():
    copies = [copy((3, 5), "bfloat16"), copy((40,), "bfloat16"), copy((1,), "float32")]
    # 15 x 2 = 30 bytes -> 64; 40 x 2 = 80 -> 128; 4 -> 64. The receipt: 16 + 3 x 16 = 64.
    assert run(7, copies) == Region(
        source_rank=7,
        pieces=[Piece(copies[0], 0, (5, 1)), Piece(copies[1], 64, (1,)), Piece(copies[2], 192, (1,))],
        receipt_offset=256,
        num_bytes=320,
    )
    assert run(7, copies).payload_bytes == 30 + 80 + 4


def test_a_rank_that_sends_nothing_has_room_for_an_empty_receipt():
    assert run(0, []) == Region(0, [], receipt_offset=0, num_bytes=64)


def test_two_ranks_write_their_rows_side_by_side_into_one_image():
    parameters: Parameters = {"w": ((4, 3), "bfloat16"), "b": ((2,), "float32")}
    first = copy((3, 3), "bfloat16", "w")
    last, bias = copy((1, 3), "bfloat16", "w", start=(3, 0), rank=1), copy((2,), "float32", "b", rank=1)
    # w: 24 bytes -> 64, b: 8 -> 128; row 3 of w begins at 3 x 3 x 2 = 18. Receipts: 32 and 48 bytes, 64 each.
    assert image(parameters, {0: [first], 1: [last, bias]}) == {
        0: Region(0, [Piece(first, 0, (3, 1))], receipt_offset=128, num_bytes=256),
        1: Region(1, [Piece(last, 18, (3, 1)), Piece(bias, 64, (1,))], receipt_offset=192, num_bytes=256),
    }


def test_a_column_is_strided_in_an_image_and_compact_in_a_run():
    # Columns 2 and 3 of 3 x 4: element (0, 2) lies 2 x 4 bytes into the parameter, rows are 4 elements apart.
    column = copy((3, 2), "float32", start=(0, 2))
    (piece,) = image({"w": ((3, 4), "float32")}, {0: [column]})[0].pieces
    assert (piece.offset, piece.strides) == (8, (4, 1))
    assert run(0, [column]).pieces[0].strides == (2, 1)
    flat = allocate(1024, CPU)
    piece.view(flat).fill_(1.0)
    assert image_views(flat, {"w": ((3, 4), "float32")})["w"].tolist() == [[0, 0, 1, 1]] * 3


def test_a_scalar_is_one_element_of_a_region():
    (piece,) = run(0, [copy((), "float32")]).pieces
    assert (piece.num_bytes, piece.view(allocate(64, CPU)).shape) == (4, ())


def test_a_piece_is_found_in_a_buffer_that_begins_inside_other_memory():
    (piece,) = run(0, [copy((), "float32"), copy((2,), "float32")]).pieces[1:]
    memory = allocate(4096, CPU)
    piece.view(memory[1024:2048]).fill_(5.0)
    assert memory[1024 + 64 : 1024 + 72].view(torch.float32).tolist() == [5.0, 5.0]
    assert memory.count_nonzero() == 4  # 5.0 has two bytes that are not zero


def chunks(length: int, num: int) -> list[tuple[int, int]]:
    """torch.chunk's, without empty ones."""
    size = -(-length // num)
    return [(start, min(size, length - start)) for start in range(0, length, size)]


def cut(shape: tuple[int, int], dimension: int, num: int) -> tuple[Shard, ...]:
    """A matrix over `num` ranks, whole on each where `dimension` is 2 (a replica)."""
    if dimension == 2:
        return tuple(Shard(rank, Box((0, 0), shape), (0, 0)) for rank in range(num))
    shards = []
    for rank, (start, length) in enumerate(chunks(shape[dimension], num)):
        begin, size = [0, 0], list(shape)
        begin[dimension], size[dimension] = start, length
        shards.append(Shard(rank, Box((begin[0], begin[1]), (size[0], size[1])), (0, 0)))
    return tuple(shards)


@st.composite
def refits(draw: st.DrawFn) -> tuple[Layout, Layout, Parameters]:
    """Matrices that a trainer holds by rows, by columns or whole, one below the other in one engine's parameters.

    The last rows of a parameter may be padding that the trainer has no values for.
    """
    source, destination, parameters = [], [], {}
    for index in range(draw(st.integers(1, 3))):
        storage, dtype, columns, row = f"p{index}", draw(DTYPES), draw(st.integers(1, 6)), 0
        for part in range(draw(st.integers(1, 3))):
            shape = (draw(st.integers(1, 7)), columns)
            tensor, shards = f"t{index}.{part}", cut(shape, draw(st.integers(0, 2)), draw(st.integers(1, 4)))
            source.append(Placement(tensor, shape, tensor, "float32", shards))
            whole = (Shard(0, Box((0, 0), shape), (row, 0)),)
            destination.append(Placement(tensor, shape, storage, dtype, whole))
            row += shape[0]
        parameters[storage] = ((row + draw(st.integers(0, 2)), columns), dtype)
    return source, destination, parameters


@given(refits())
@settings(max_examples=100, deadline=None)
def test_what_one_source_sends_to_one_destination_is_one_stretch_in_plan_order(
    sides: tuple[Layout, Layout, Parameters],
):
    source, destination, _ = sides
    plan = plan_transfer(source, destination)
    for rank, to in plan.pairs():
        copies = list(plan.copies(rank, to))
        region = run(rank, copies)
        assert [piece.copy for piece in region.pieces] == copies
        end = 0
        for piece in region.pieces:
            assert 0 <= piece.offset - end < ALIGNMENT_BYTES
            assert piece.offset % ALIGNMENT_BYTES == 0
            end = piece.offset + piece.num_bytes
        assert 0 <= region.receipt_offset - end < ALIGNMENT_BYTES
        receipt_bytes = RECEIPT_HEADER_BYTES + DIGEST_BYTES * len(copies)
        assert receipt_bytes <= region.num_bytes - region.receipt_offset < receipt_bytes + ALIGNMENT_BYTES


@given(refits())
@settings(max_examples=100, deadline=None)
def test_the_images_of_several_sources_never_overlap_and_fill_all_that_the_trainer_holds(
    sides: tuple[Layout, Layout, Parameters],
):
    source, destination, parameters = sides
    plan = plan_transfer(source, destination)
    regions = image(parameters, {rank: list(plan.copies(rank, to)) for rank, to in plan.pairs()})
    (num_bytes,) = {region.num_bytes for region in regions.values()}
    flat = allocate(num_bytes, CPU)
    for region in regions.values():
        for piece in region.pieces:
            piece.view(flat).add_(1)
    held = dict.fromkeys(parameters, 0)
    for placement in destination:
        held[placement.storage] += placement.shape[0]
    for name, view in image_views(flat, parameters).items():
        assert (view[: held[name]] == 1).all()
        assert (view[held[name] :] == 0).all()
    # Behind the parameters, every source has room for its own receipt, and nothing wrote there.
    _, end = image_offsets(parameters)
    for region in sorted(regions.values(), key=lambda region: region.receipt_offset):
        assert region.receipt_offset >= end
        end = region.receipt_offset + RECEIPT_HEADER_BYTES + DIGEST_BYTES * len(region.pieces)
        assert flat[region.receipt_offset : end].count_nonzero() == 0
    assert end <= num_bytes


def test_the_parameters_of_an_image_are_aligned_and_cover_nothing_twice():
    parameters: Parameters = {"a": ((3, 5), "bfloat16"), "b": ((), "float32"), "c": ((2, 2, 2), "float32")}
    assert image_offsets(parameters) == ({"a": 0, "b": 64, "c": 128}, 192)
    flat = allocate(192, CPU)
    views = image_views(flat, parameters)
    for number, view in enumerate(views.values(), start=1):
        view.fill_(number)
    assert {name: (view.shape, view.dtype, view.unique().tolist()) for name, view in views.items()} == {
        "a": ((3, 5), torch.bfloat16, [1.0]),
        "b": ((), torch.float32, [2.0]),
        "c": ((2, 2, 2), torch.float32, [3.0]),
    }


@pytest.mark.parametrize(("asked", "got"), [(0, 1), (1, 1), (mmap.PAGESIZE, 1), (mmap.PAGESIZE + 1, 2)])
def test_a_buffer_is_whole_pages_of_zeros_on_a_page_boundary(asked: int, got: int):
    flat = allocate(asked, CPU)
    assert (flat.dtype, flat.numel(), flat.data_ptr() % mmap.PAGESIZE) == (torch.uint8, got * mmap.PAGESIZE, 0)
    assert flat.count_nonzero() == 0
