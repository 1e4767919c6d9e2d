import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.arena import Piece, Region, allocate, image, itemsize
from transport.base import Landing
from transport.buckets import (
    MAX_BUFFER_BYTES,
    MIN_BUFFER_BYTES,
    NUM_BUFFERS,
    Bucket,
    Inflow,
    LandedImages,
    bounded,
    buffer_bytes,
    cut,
)
from transport.packing import Packer
from transport.plan import Copy
from transport.receipt import VerificationError

CPU = torch.device("cpu")
MIB = 1 << 20
Case = tuple[Region, dict[str, torch.Tensor]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Boxes of up to three dimensions in an image's wider parameters, and the tensors that they come from."""
    parameters, copies, sources = {}, [], {}
    for index in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        before, after, skipped = (tuple(draw(st.integers(0, 2)) for _ in shape) for _ in range(3))
        dtype = draw(st.sampled_from(["float32", "bfloat16"]))
        name = f"w{index}"
        parameters[name] = (tuple(b + n + a for b, n, a in zip(before, shape, after, strict=True)), dtype)
        whole = tuple(s + n for s, n in zip(skipped, shape, strict=True))
        sources[name] = ((torch.arange(math.prod(whole)).reshape(whole) * 7 + index) % 127).float()
        copies.append(Copy(name, 3, name, skipped, 0, name, before, shape, dtype))
    return image(parameters, {3: copies})[3], sources


def elements(pieces: list[Piece]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    """Each element's tensor, index in the source and in the destination, and first byte in the buffer."""
    for piece in pieces:
        copy = piece.copy
        for index in itertools.product(*map(range, copy.shape)):
            at = sum(i * stride for i, stride in zip(index, piece.strides, strict=True)) * itemsize(copy.dtype)
            yield copy.tensor, moved(copy.source_start, index), moved(copy.destination_start, index), piece.offset + at


def moved(start: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s + i for s, i in zip(start, index, strict=True))


@given(cases(), st.sampled_from([128, 192, 256, 320, 512, 4096]))
@settings(max_examples=200, deadline=None)
def test_buckets_hold_every_element_once_and_none_is_longer_than_a_buffer(case: Case, num_bytes: int):
    region, _ = case
    buckets = cut(region, num_bytes)
    landed = [element for bucket in buckets for element in elements(bucket.landed)]
    assert sorted(landed) == sorted(elements(region.pieces))
    for bucket in buckets:
        assert len(bucket.landed) > 0
        assert bucket.region.num_bytes <= num_bytes
        assert [piece.copy for piece in bucket.region.pieces] == [piece.copy for piece in bucket.landed]


@given(cases(), st.sampled_from([128, 256, 512, 4096]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_region_that_went_through_buckets_is_the_one_that_is_packed_at_once(case: Case, num_bytes: int, verify: bool):
    region, sources = case
    expected = allocate(region.num_bytes, CPU)
    Packer(region, expected, sources).write(4, verify=False)
    landed = allocate(region.num_bytes, CPU)
    way = Way(region, sources, num_bytes, landed)
    way.inflow.begin()
    for index in range(len(way.buckets)):
        way.load(index, 4, verify)
    assert way.inflow.is_whole
    assert torch.equal(landed, expected)


class Way:
    """Both ends of a region's way through two buffers, in one process."""

    def __init__(self, region: Region, sources: dict[str, torch.Tensor], num_bytes: int, landed: torch.Tensor) -> None:
        self.buckets: list[Bucket] = cut(region, num_bytes)
        self.buffers = [allocate(num_bytes, CPU) for _ in range(NUM_BUFFERS)]
        self.packers = [
            Packer(bucket.region, self.buffers[index % NUM_BUFFERS], sources)
            for index, bucket in enumerate(self.buckets)
        ]
        self.inflow = Inflow(region, self.buckets, self.buffers, landed)

    def load(self, index: int, version: int, verify: bool = True) -> None:
        packed = self.packers[index].write(version, verify)
        self.inflow.load(index, version, packed.seal)


def rows_of(num_rows: int, num_columns: int) -> Case:
    shape = (num_rows, num_columns)
    copies = [Copy("w", 3, "w", (0, 0), 0, "w", (0, 0), shape, "float32")]
    return image({"w": (shape, "float32")}, {3: copies})[3], {"w": torch.rand(shape)}


def test_a_bucket_takes_whole_rows_and_leaves_room_for_its_receipt():
    # Rows of 100 bytes; 512 - 64 for a receipt of one digest is room for 4 rows of 10.
    buckets = cut(rows_of(10, 25)[0], 512)
    assert [[piece.copy.shape for piece in bucket.landed] for bucket in buckets] == [[(4, 25)], [(4, 25)], [(2, 25)]]
    assert [bucket.landed[0].copy.destination_start for bucket in buckets] == [(0, 0), (4, 0), (8, 0)]
    assert [bucket.landed[0].offset for bucket in buckets] == [0, 400, 800]
    assert [bucket.region.num_bytes for bucket in buckets] == [448 + 64, 448 + 64, 256 + 64]


def test_a_row_larger_than_a_buffer_is_cut_along_the_next_dimension():
    # Rows of 400 bytes; 256 - 64 is room for 48 elements, and after a row's last 4 for 32 of the next: 16 + 2 * 16
    # bytes of digests would fit, but receipts are rounded to 64.
    parts = [piece.copy for bucket in cut(rows_of(2, 100)[0], 256) for piece in bucket.landed]
    assert [(part.destination_start, part.shape) for part in parts] == [
        ((0, 0), (1, 48)), ((0, 48), (1, 48)), ((0, 96), (1, 4)),
        ((1, 0), (1, 32)), ((1, 32), (1, 48)), ((1, 80), (1, 20)),
    ]  # fmt: skip


def test_the_length_of_a_buffer_follows_free_memory_within_bounds():
    assert (MIN_BUFFER_BYTES, MAX_BUFFER_BYTES) == (4 * MIB, 16 * MIB)
    assert [bounded(n) for n in (0, 5 * MIB, 7 * MIB + 5, 15 * MIB, 17 * MIB, 1 << 50)] == [
        n * MIB for n in (4, 4, 6, 14, 16, 16)
    ]
    assert MIN_BUFFER_BYTES <= buffer_bytes(CPU) <= MAX_BUFFER_BYTES


def test_a_changed_byte_is_found_where_it_has_landed_and_named():
    region, sources = rows_of(10, 25)
    way = Way(region, sources, 512, allocate(region.num_bytes, CPU))
    way.inflow.begin()
    way.load(0, 7)
    packed = way.packers[1].write(7, True)
    way.buffers[1][399] ^= 1
    with pytest.raises(
        VerificationError, match=r"version 7 from train rank 3: w has the digest [0-9a-f]{32}, published"
    ):
        way.inflow.load(1, 7, packed.seal)
    assert not way.inflow.is_whole


def test_a_bucket_of_another_version_and_one_out_of_turn_are_refused():
    region, sources = rows_of(10, 25)
    way = Way(region, sources, 512, allocate(region.num_bytes, CPU))
    way.inflow.begin()
    seal = way.packers[0].write(6, True).seal
    with pytest.raises(VerificationError, match="version 7 from train rank 3: its region holds version 6"):
        way.inflow.load(0, 7, seal)
    with pytest.raises(VerificationError, match="version 6 from train rank 3: bucket 1 came when 0 of 3 were here"):
        way.load(1, 6)
    for index in range(3):
        way.load(index, 6)
    with pytest.raises(VerificationError, match="version 6 from train rank 3: bucket 3 came when 3 of 3 were here"):
        way.inflow.load(3, 6, seal)


def test_an_image_is_a_version_only_while_all_of_it_from_every_source_is_there():
    shape = (10, 25)
    copies = {
        rank: [Copy(f"w{rank}", rank, f"w{rank}", (0, 0), 0, f"w{rank}", (0, 0), shape, "float32")] for rank in (0, 1)
    }
    parameters = {f"w{rank}": (shape, "float32") for rank in (0, 1)}
    regions = image(parameters, copies)
    landed = LandedImages(regions, Landing(parameters, CPU, turns=True))
    assert len(landed.flats) == 2
    ways = [Way(regions[rank], {f"w{rank}": torch.rand(shape)}, 512, landed.flats[0]) for rank in (0, 1)]
    for way in ways:
        way.inflow.begin()
    for index in range(3):
        ways[0].load(index, 4)
    for index in range(2):
        ways[1].load(index, 4)
    with pytest.raises(
        VerificationError, match="version 4 from train rank 1: its region holds a version that is being"
    ):
        landed.check(4)
    ways[1].load(2, 4)
    landed.check(4)
    assert landed.image(4).data_ptr() == landed.flats[0].data_ptr() != landed.image(5).data_ptr()
    assert torch.equal(landed.views(4)[1][0], landed.image(4)[1024:2024].view(torch.float32).view(shape))
    with pytest.raises(VerificationError, match="version 2 from train rank 0: its region holds version 4"):
        landed.check(2)
    ways[0].inflow.begin()
    with pytest.raises(
        VerificationError, match="version 4 from train rank 0: its region holds a version that is being"
    ):
        landed.check(4)
