import contextlib
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import packing, team
from transport.arena import Region, allocate, image, run
from transport.packing import Packer, Unpacker
from transport.plan import Copy
from transport.receipt import VerificationError

CPU = torch.device("cpu")
UNTOUCHED = 0xAB
DTYPES = ("float32", "bfloat16", "float16")
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-40, 3e38, 1 + 2**-8, 65520.0]
"""Signed zeros, infinities, a subnormal, overflows and a tie of rounding, in the dtypes above.

Without NaN: torch's cast of it has other bits in the middle of a vector (0xffff in bfloat16) than alone (0x7fc0).
"""


@dataclass
class Sending:
    """What a train rank holds, and where its pieces go."""

    region: Region
    sources: dict[str, torch.Tensor]

    def expected(self) -> list[bytes]:
        """The bytes of every piece, by torch's own cast alone."""
        pieces = []
        for piece in self.region.pieces:
            box = tuple(slice(a, a + n) for a, n in zip(piece.copy.source_start, piece.copy.shape, strict=True))
            cast = self.sources[piece.copy.source_storage][box].clone().to(getattr(torch, piece.copy.dtype))
            pieces.append(raw(cast))
        return pieces


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def values(num: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = torch.randn(num, generator=torch.Generator().manual_seed(seed)) * 3
    special = torch.tensor(SPECIAL).repeat(num // len(SPECIAL) + 1)
    numbers[::5] = special[: len(numbers[::5])]
    return numbers.to(dtype)


@st.composite
def sendings(draw: st.DrawFn) -> Sending:
    """Boxes of small tensors, packed into a run or side by side into an image's fused parameters.

    The sources are slices of one memory, with or without gaps, so that some neighbours can be joined and some cannot.
    """
    source_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    memory = values(800, source_dtype, draw(st.integers(0, 99)))
    sources: dict[str, torch.Tensor] = {}
    copies: list[Copy] = []
    parameters: dict[str, tuple[tuple[int, ...], str]] = {}
    row, place, columns, dtype = 0, 0, 1, "float32"
    for index in range(draw(st.integers(1, 6))):
        if not parameters or draw(st.booleans()):
            parameter, row = f"p{len(parameters)}", 0
            columns, dtype = draw(st.sampled_from([1, 2, 5, 16])), draw(st.sampled_from(DTYPES))
        rows = draw(st.integers(1, 8))
        sources[f"t{index}"] = memory[place : place + rows * columns].view(rows, columns)
        place += rows * columns + draw(st.sampled_from([0, 0, 3]))
        first = draw(st.integers(0, columns - 1)) if draw(st.booleans()) else 0  # a column slice is strided
        shape = (rows, columns - first)
        copies.append(Copy(f"t{index}", 4, f"t{index}", (0, first), 0, parameter, (row, first), shape, dtype))
        row += rows
        parameters[parameter] = ((row, columns), dtype)
    region = run(4, copies) if draw(st.booleans()) else image(parameters, {4: copies})[4]
    return Sending(region, sources)


def written(sending: Sending, version: int, verify: bool) -> tuple[torch.Tensor, packing.Packed]:
    flat = allocate(sending.region.num_bytes, CPU).fill_(UNTOUCHED)
    return flat, Packer(sending.region, flat, sending.sources).write(version, verify)


def pieces_in(flat: torch.Tensor, region: Region) -> list[bytes]:
    """The bytes of every piece, found in the buffer by NumPy."""
    found = []
    for piece in region.pieces:
        size = getattr(torch, piece.copy.dtype).itemsize
        elements = np.lib.stride_tricks.as_strided(
            flat.numpy()[piece.offset :], (*piece.copy.shape, size), (*(s * size for s in piece.strides), 1)
        )
        found.append(elements.tobytes())
    return found


@contextlib.contextmanager
def working_in(block_bytes: int, team_size: int) -> Iterator[None]:
    """With blocks of that size and a team of so many threads, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_BYTES", block_bytes)
        patch.setattr(team, "_size", team_size)
        patch.setattr(team, "_threads", TWO_THREADS if team_size > 1 else None)
        yield


TWO_THREADS = ThreadPoolExecutor(2)
BLOCKS_AND_TEAMS = st.tuples(st.sampled_from([16, 64, 100, packing.BLOCK_BYTES]), st.integers(1, 3))


@given(sendings(), st.booleans(), BLOCKS_AND_TEAMS)
@settings(max_examples=200, deadline=None)
def test_every_piece_is_torchs_cast_and_nothing_else_is_written(sending: Sending, verify: bool, work: tuple[int, int]):
    with working_in(*work):
        flat, _ = written(sending, 5, verify)
    assert pieces_in(flat, sending.region) == sending.expected()
    for piece in sending.region.pieces:
        piece.view(flat).view(torch.int32 if piece.copy.dtype == "float32" else torch.int16).fill_(0)
    receipt_bytes = 16 + (16 * len(sending.region.pieces) if verify else 0)
    flat[sending.region.receipt_offset : sending.region.receipt_offset + receipt_bytes] = 0
    covered = sum(piece.num_bytes for piece in sending.region.pieces) + receipt_bytes
    assert int((flat == UNTOUCHED).sum()) == flat.numel() - covered


@given(sendings(), BLOCKS_AND_TEAMS)
@settings(max_examples=200, deadline=None)
def test_the_digests_are_xxh3_of_the_bytes_in_plan_order(sending: Sending, work: tuple[int, int]):
    with working_in(*work):
        flat, packed = written(sending, 5, verify=True)
    digests = b"".join(xxhash.xxh3_128(piece).digest() for piece in sending.expected())
    receipt = struct.pack("<qq", 5, len(sending.region.pieces)) + digests
    begin = sending.region.receipt_offset
    assert flat[begin : begin + len(receipt)].numpy().tobytes() == receipt
    assert packed.seal == xxhash.xxh3_128(receipt).digest()


def test_an_unverified_write_has_no_seal_and_no_digests():
    sending = two_tensors()
    flat, packed = written(sending, 5, verify=False)
    assert packed.seal is None
    begin = sending.region.receipt_offset
    assert flat[begin : begin + 32].numpy().tobytes() == struct.pack("<qq", 5, 0) + bytes([UNTOUCHED]) * 16


def two_tensors() -> Sending:
    sources = {"q": torch.arange(12.0).view(4, 3), "norm": torch.ones(5)}
    copies = [
        Copy("q", 4, "q", (0, 0), 0, "q", (0, 0), (4, 3), "bfloat16"),
        Copy("norm", 4, "norm", (0,), 0, "norm", (0,), (5,), "float32"),
    ]
    return Sending(run(4, copies), sources)


@pytest.mark.parametrize("team_size", [1, 2, 3])
def test_pieces_larger_than_a_block_between_small_ones_are_digested_whole(team_size: int):
    # Blocks of 65,536 bytes: b and d have 2.5 each, the strided e 3; a, c and f are joined with their neighbours.
    sizes = {"a": 32, "b": 81_920, "c": 16, "d": 81_952, "f": 8}
    memory = values(sum(sizes.values()), torch.float32, seed=0)
    parts = memory.split(list(sizes.values()))
    sources = dict(zip(sizes, parts, strict=True)) | {"e": values(196_608, torch.float32, 1).view(192, 1024)}
    copies = [Copy(name, 4, name, (0,), 0, name, (0,), (size,), "bfloat16") for name, size in sizes.items()]
    copies.append(Copy("e", 4, "e", (0, 500), 0, "e", (0, 0), (192, 512), "bfloat16"))
    sending = Sending(run(4, copies), sources)
    with working_in(65_536, team_size):
        verified, packed = written(sending, 5, verify=True)
        assert pieces_in(verified, sending.region) == sending.expected()
        Unpacker(sending.region, verified).check(5, packed.seal)
        unverified, _ = written(sending, 5, verify=False)
    assert torch.equal(verified[: sending.region.receipt_offset], unverified[: sending.region.receipt_offset])


@pytest.mark.parametrize("verify", [True, False])
def test_a_weight_that_is_not_a_number_stays_none(verify: bool):
    sending = two_tensors()
    sending.sources["q"][2, 1] = math.nan
    flat, _ = written(sending, 5, verify)
    assert sending.region.pieces[0].view(flat).isnan().nonzero().tolist() == [[2, 1]]


def test_a_write_takes_the_shards_as_they_are_then_and_replaces_all_of_the_last_version():
    sending = two_tensors()
    flat = allocate(sending.region.num_bytes, CPU)
    packer = Packer(sending.region, flat, sending.sources)
    packer.write(1, verify=True)
    for source in sending.sources.values():
        source.add_(100)
    packed = packer.write(3, verify=True)
    assert pieces_in(flat, sending.region) == sending.expected()
    Unpacker(sending.region, flat).check(3, packed.seal)


# Joining neighbours.


def slices(memory: torch.Tensor, gaps: list[int], sizes: list[int]) -> list[torch.Tensor]:
    """Consecutive slices of one memory, each after a gap."""
    parts, place = [], 0
    for gap, size in zip(gaps, sizes, strict=True):
        parts.append(memory[place + gap : place + gap + size])
        place += gap + size
    return parts


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 2]), st.sampled_from([0, 0, 3])), min_size=1))
@settings(max_examples=100, deadline=None)
def test_neighbours_are_joined_exactly_where_they_touch_in_both_memories(pieces: list[tuple[int, int, int]]):
    sizes = [size for size, _, _ in pieces]
    source, destination = torch.arange(999.0), torch.zeros(999, dtype=torch.bfloat16)
    sources = slices(source, [gap for _, gap, _ in pieces], sizes)
    destinations = slices(destination, [gap for _, _, gap in pieces], sizes)
    touching = sum(gap_of == gap_to == 0 for _, gap_of, gap_to in pieces[1:])
    pairs = list(zip(destinations, sources, strict=True))
    spans = packing._spans(pairs)
    assert len(spans) == len(pieces) - touching
    assert [(to.numel(), of.numel()) for to, of in spans] == [(of.numel(), of.numel()) for _, of in spans]
    assert sum(of.numel() for _, of in spans) == sum(sizes)
    blocks = packing._blocks(pairs)
    assert len(blocks) == len(spans)
    assert [index for block in blocks for index, _ in block.pieces] == list(range(len(pieces)))


def test_a_thousand_small_neighbours_are_a_handful_of_casts():
    # 1000 tensors of 32 elements, 64 bytes each in bfloat16: 64,000 bytes, two blocks of 2**15.
    memory, flat = torch.randn(32_000), allocate(64_000, CPU).view(torch.bfloat16)
    pairs = list(zip(flat[:32_000].split(32), memory.split(32), strict=True))
    assert len(packing._spans(pairs)) == 1
    with working_in(1 << 15, team_size=1):
        assert len(packing._blocks(pairs)) == 2


def test_tensors_of_two_memories_are_not_joined_though_one_ends_where_the_other_begins():
    # Both are views of one buffer as the allocator sees it, but separate storages, as two parameters are.
    memory = np.zeros(8, dtype=np.float32)
    first, second = torch.from_numpy(memory[:4]), torch.from_numpy(memory[4:])
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    destination = torch.zeros(8)
    assert len(packing._spans([(destination[:4], first), (destination[4:], second)])) == 2


def test_every_other_element_of_a_vector_is_not_joined_with_what_begins_among_them():
    # 16 elements, every other one of memory 0..31, count as many bytes as lie before element 16, where the next begins.
    memory = torch.arange(48.0)
    sources = {"a": memory[0:32:2], "b": memory[16:32]}
    copies = [Copy(name, 4, name, (0,), 0, name, (0,), (16,), "float32") for name in "ab"]
    sending = Sending(run(4, copies), sources)
    for verify in (True, False):
        flat, _ = written(sending, 5, verify)
        assert pieces_in(flat, sending.region) == sending.expected()


def test_two_dtypes_are_never_one_cast():
    flat = allocate(64, CPU)
    destinations = [flat[:8].view(torch.bfloat16), flat[8:24].view(torch.float32)]
    source = torch.arange(8.0)
    assert len(packing._spans(list(zip(destinations, source.split(4), strict=True)))) == 2


# Reading.


@given(sendings(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_byte_of_a_tensor_is_found_and_named_with_train_rank_and_version(
    sending: Sending, data: st.DataObject
):
    flat, packed = written(sending, 6, verify=True)
    unpacker = Unpacker(sending.region, flat)
    unpacker.check(6, packed.seal)
    index = data.draw(st.integers(0, len(sending.region.pieces) - 1))
    piece = sending.region.pieces[index]
    element = [data.draw(st.integers(0, length - 1)) for length in piece.copy.shape]
    size = getattr(torch, piece.copy.dtype).itemsize
    place = piece.offset + size * sum(i * stride for i, stride in zip(element, piece.strides, strict=True))
    flat[place + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VerificationError, match=rf"^version 6 from train rank 4: {piece.copy.tensor} has the digest "):
        unpacker.check(6, packed.seal)


def test_the_views_are_the_pieces_where_they_landed():
    sending = two_tensors()
    flat, _ = written(sending, 5, verify=True)
    landed = allocate(sending.region.num_bytes, CPU)
    landed.copy_(flat)
    q, norm = Unpacker(sending.region, landed).views
    assert q.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert norm.tolist() == [1] * 5
    assert q.data_ptr() == landed.data_ptr()


@pytest.mark.parametrize("verify", [True, False])
def test_another_version_than_the_one_that_was_asked_for_is_refused(verify: bool):
    sending = two_tensors()
    flat, packed = written(sending, 5, verify)
    for version in (3, 7):
        with pytest.raises(VerificationError, match=f"^version {version} from train rank 4: .* holds version 5$"):
            Unpacker(sending.region, flat).check(version, packed.seal)


def test_the_seal_of_another_version_is_refused():
    sending = two_tensors()
    _, old = written(sending, 3, verify=True)
    flat, _ = written(sending, 5, verify=True)
    with pytest.raises(VerificationError, match="the receipt of its digests was changed on the way"):
        Unpacker(sending.region, flat).check(5, old.seal)


@given(st.integers(16, 16 + 2 * 16 - 1), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_changed_digest_in_the_receipt_is_refused(place: int, change: int):
    sending = two_tensors()
    flat, packed = written(sending, 5, verify=True)
    flat[sending.region.receipt_offset + place] ^= change
    with pytest.raises(VerificationError, match="version 5 from train rank 4: the receipt"):
        Unpacker(sending.region, flat).check(5, packed.seal)


class CrashedError(Exception):
    pass


def crash(*arguments: Any) -> Any:
    raise CrashedError


@pytest.mark.parametrize(
    ("verify", "step"),
    [
        (False, "transport.packing._copy_spans"),  # before the first byte
        (False, "transport.packing.write_receipt"),  # after the last
        (True, "transport.packing.digest"),  # after the first block
        (True, "transport.packing.write_receipt"),
    ],
)
def test_a_half_that_is_being_written_is_neither_the_old_version_nor_the_new(
    verify: bool, step: str, monkeypatch: pytest.MonkeyPatch
):
    sending = two_tensors()
    flat, packed = written(sending, 5, verify)
    monkeypatch.setattr(step, crash)
    with pytest.raises(CrashedError):
        Packer(sending.region, flat, sending.sources).write(7, verify)
    monkeypatch.undo()
    for version in (5, 7):
        with pytest.raises(VerificationError, match="its region holds a version that is being written"):
            Unpacker(sending.region, flat).check(version, packed.seal)
