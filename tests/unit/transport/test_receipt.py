import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.arena import Region, allocate, run
from transport.plan import Copy
from transport.receipt import (
    VerificationError,
    check_digests,
    check_version,
    digest,
    withdraw_receipt,
    write_receipt,
)

DIGESTS = [bytes([index]) * 16 for index in (1, 2, 3)]
NAMES = ("embed", "k_proj", "norm")


def a_region(rank: int = 3) -> tuple[Region, torch.Tensor]:
    """Three pieces of a train rank, and a buffer with something in it."""
    region = run(rank, [Copy(name, rank, name, (0,), 0, name, (0,), (4,), "float32") for name in NAMES])
    flat = allocate(region.num_bytes, torch.device("cpu"))
    return region, flat.fill_(0xAB)


def test_a_receipt_is_a_version_a_count_and_the_digests_behind_the_pieces():
    region, flat = a_region()
    seal = write_receipt(flat, region, 17, b"".join(DIGESTS))
    receipt = struct.pack("<qq", 17, 3) + b"".join(DIGESTS)
    # Three pieces of 16 bytes, each at a multiple of 64: the receipt begins at 192.
    assert flat[192 : 192 + len(receipt)].numpy().tobytes() == receipt
    assert seal == xxhash.xxh3_128(receipt).digest()
    assert (flat[:192] == 0xAB).all()
    assert (flat[192 + len(receipt) :] == 0xAB).all()


def test_equal_digests_under_the_right_seal_are_accepted():
    region, flat = a_region()
    seal = write_receipt(flat, region, 17, b"".join(DIGESTS))
    check_version(flat, region, 17)
    check_digests(flat, region, 17, seal, DIGESTS)


@given(st.integers(0, 2), st.integers(0, 15), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_any_other_byte_of_a_digest_is_an_error_that_names_tensor_rank_and_version(index: int, byte: int, change: int):
    region, flat = a_region()
    seal = write_receipt(flat, region, 17, b"".join(DIGESTS))
    landed = [bytearray(one) for one in DIGESTS]
    landed[index][byte] ^= change
    with pytest.raises(VerificationError) as caught:
        check_digests(flat, region, 17, seal, [bytes(one) for one in landed])
    assert str(caught.value) == (
        f"version 17 from train rank 3: {NAMES[index]} has the digest {landed[index].hex()}, "
        f"published as {DIGESTS[index].hex()}"
    )


@given(st.integers(0, 16 + 3 * 16 - 1), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_any_changed_byte_of_a_receipt_is_found(place: int, change: int):
    region, flat = a_region()
    seal = write_receipt(flat, region, 17, b"".join(DIGESTS))
    flat[region.receipt_offset + place] ^= change
    with pytest.raises(VerificationError, match=r"^version 17 from train rank 3: the receipt of its digests was chang"):
        check_digests(flat, region, 17, seal, DIGESTS)


def test_digests_changed_together_with_the_bytes_do_not_pass_as_the_published_ones():
    region, flat = a_region()
    seal = write_receipt(flat, region, 17, b"".join(DIGESTS))
    write_receipt(flat, region, 17, b"".join(DIGESTS[::-1]))
    with pytest.raises(VerificationError, match="receipt"):
        check_digests(flat, region, 17, seal, DIGESTS[::-1])


def test_the_receipt_of_another_version_has_another_seal():
    region, flat = a_region()
    seals = {write_receipt(flat, region, version, b"".join(DIGESTS)) for version in (15, 17)}
    assert len(seals) == 2


def test_another_version_than_the_expected_is_refused():
    region, flat = a_region()
    write_receipt(flat, region, 15, b"")
    with pytest.raises(VerificationError, match=r"^version 17 from train rank 3: its region holds version 15$"):
        check_version(flat, region, 17)


def test_a_region_that_is_being_written_is_no_version():
    region, flat = a_region()
    write_receipt(flat, region, 15, b"")
    withdraw_receipt(flat, region)
    for version in (15, 17):
        with pytest.raises(VerificationError, match="its region holds a version that is being written"):
            check_version(flat, region, version)


def test_a_region_that_was_never_written_is_not_version_1():
    region, flat = a_region()
    with pytest.raises(VerificationError):
        check_version(flat.zero_(), region, 1)


def test_an_unverified_receipt_names_its_version_alone():
    region, flat = a_region()
    write_receipt(flat, region, 17, b"")
    check_version(flat, region, 17)
    assert flat[192:208].numpy().tobytes() == struct.pack("<qq", 17, 0)


@given(st.binary(min_size=64, max_size=256), st.data())
@settings(max_examples=50, deadline=None)
def test_two_swapped_blocks_of_bytes_have_another_digest(data: bytes, draw: st.DataObject):
    one, other = sorted(draw.draw(st.tuples(st.integers(0, len(data) // 8 - 1), st.integers(0, len(data) // 8 - 1))))
    words = [data[8 * index : 8 * index + 8] for index in range(len(data) // 8)]
    if words[one] == words[other]:
        return
    words[one], words[other] = words[other], words[one]
    assert digest(b"".join(words)) != digest(data[: 8 * len(words)])
