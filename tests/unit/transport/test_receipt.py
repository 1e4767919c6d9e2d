import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.arena import Arena, Slot
from transport.receipt import VerificationError, digest, verify

NUM_BYTES = 4096


def filled(seed: int = 0) -> Arena:
    arena = Arena([Slot("w", (NUM_BYTES // 4,), "float32", 0)], torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    arena.flat.copy_(torch.randint(0, 256, arena.flat.shape, generator=generator, dtype=torch.uint8))
    return arena


def test_equal_bytes_have_equal_digests():
    verify(filled(), digest(filled()), rank=0, version=1)


def test_other_bytes_have_another_digest():
    assert digest(filled(0)) != digest(filled(1))


@given(st.integers(0, NUM_BYTES - 1), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_one_changed_byte_is_found(place: int, change: int):
    arena = filled()
    expected = digest(arena)
    arena.flat[place] ^= change
    with pytest.raises(VerificationError):
        verify(arena, expected, rank=0, version=1)


def test_two_swapped_blocks_are_found():
    arena = filled()
    expected = digest(arena)
    arena.flat[:64], arena.flat[1024:1088] = arena.flat[1024:1088].clone(), arena.flat[:64].clone()
    with pytest.raises(VerificationError):
        verify(arena, expected, rank=0, version=1)


def test_a_missing_tail_is_found():
    arena = filled()
    expected = digest(arena)
    arena.flat[-1024:] = 0
    with pytest.raises(VerificationError):
        verify(arena, expected, rank=0, version=1)


def test_the_error_names_the_version_the_rank_and_both_digests():
    arena = filled()
    with pytest.raises(VerificationError) as caught:
        verify(arena, "0" * 32, rank=3, version=17)
    assert str(caught.value) == f"version 17 from train rank 3: digest {digest(arena)}, published as {'0' * 32}"
