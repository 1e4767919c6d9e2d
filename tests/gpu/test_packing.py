"""Packing on CUDA memory: the CPU's bytes, the CPU's digests, and no sooner than they are there. Not yet run."""

import math
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.test_packing import UNTOUCHED, Sending, pieces_in, sendings, two_tensors, values
from transport.arena import allocate, run
from transport.packing import FusedCopy, Packed, Packer, Unpacker
from transport.plan import Copy
from transport.receipt import VerificationError

CUDA = torch.device("cuda")
LONG_CYCLES = 2_000_000_000
"""About a second of a kernel that only waits."""


def on_gpu(sending: Sending) -> Sending:
    """The same with its sources on the GPU: those that were slices of one memory still are."""
    memories: dict[int, torch.Tensor] = {}
    sources = {}
    for name, source in sending.sources.items():
        storage = source.untyped_storage()
        if storage.data_ptr() not in memories:
            memories[storage.data_ptr()] = torch.empty(0, dtype=source.dtype).set_(storage).to(CUDA)
        memory = memories[storage.data_ptr()]
        sources[name] = memory.as_strided(source.shape, source.stride(), source.storage_offset())
    return Sending(sending.region, sources)


def written(sending: Sending, version: int, verify: bool) -> tuple[torch.Tensor, Packed]:
    """What a write of these host sources leaves in CUDA memory, and its announcement."""
    gpu = on_gpu(sending)
    flat = allocate(gpu.region.num_bytes, CUDA).fill_(UNTOUCHED)
    return flat, Packer(gpu.region, flat, gpu.sources).write(version, verify)


@given(sendings(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_piece_is_the_cpus_cast_and_nothing_else_is_written(sending: Sending, verify: bool) -> None:
    flat, _ = written(sending, 5, verify)
    host = flat.cpu()
    assert pieces_in(host, sending.region) == sending.expected()
    for piece in sending.region.pieces:
        piece.view(host).view(torch.int32 if piece.copy.dtype == "float32" else torch.int16).fill_(0)
    receipt_bytes = 16 + (16 * len(sending.region.pieces) if verify else 0)
    host[sending.region.receipt_offset : sending.region.receipt_offset + receipt_bytes] = 0
    covered = sum(piece.num_bytes for piece in sending.region.pieces) + receipt_bytes
    assert int((host == UNTOUCHED).sum()) == host.numel() - covered


@given(sendings())
@settings(max_examples=100, deadline=None)
def test_the_digests_are_xxh3_of_the_bytes_copied_to_the_host_and_agree_where_they_landed(sending: Sending) -> None:
    flat, packed = written(sending, 5, verify=True)
    host = flat.cpu()
    digests = b"".join(xxhash.xxh3_128(piece).digest() for piece in pieces_in(host, sending.region))
    receipt = struct.pack("<qq", 5, len(sending.region.pieces)) + digests
    begin = sending.region.receipt_offset
    assert host[begin : begin + len(receipt)].numpy().tobytes() == receipt
    assert packed.seal == xxhash.xxh3_128(receipt).digest()
    Unpacker(sending.region, flat).check(5, packed.seal)
    Unpacker(sending.region, host).check(5, packed.seal)  # the digests do not depend on where the bytes lie


def test_every_float32_rounds_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    # All 65,536 upper halves, each at, around and away from the tie between two bfloat16 neighbours; no NaN, whose
    # payload no format promises.
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper.unsqueeze(1) | lower).flatten()
    bits = bits[(bits & 0x7FFFFFFF) <= 0x7F800000]
    numbers = bits.where(bits < 1 << 31, bits - (1 << 32)).to(torch.int32).view(torch.float32)
    copy = Copy("w", 0, "w", (0,), 0, "w", (0,), (len(numbers),), "bfloat16")
    sending = Sending(run(0, [copy]), {"w": numbers})
    flat, _ = written(sending, 1, verify=False)
    (found,) = pieces_in(flat.cpu(), sending.region)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    assert found == rounded.to(torch.uint16).numpy().tobytes()


def test_pieces_of_many_megabytes_between_small_ones_are_digested_whole() -> None:
    # 20,000,000 bytes, more than any block or staging buffer, between neighbours; then a strided piece.
    sizes = {"a": 32, "b": 10_000_000, "c": 16}
    memory = values(sum(sizes.values()), torch.float32, seed=0)
    sources = dict(zip(sizes, memory.split(list(sizes.values())), strict=True))
    sources["d"] = values(6_000_000, torch.float32, 1).view(3000, 2000)
    copies = [Copy(name, 4, name, (0,), 0, name, (0,), (size,), "bfloat16") for name, size in sizes.items()]
    copies.append(Copy("d", 4, "d", (0, 500), 0, "d", (0, 0), (3000, 1000), "bfloat16"))
    sending = Sending(run(4, copies), sources)
    flat, packed = written(sending, 5, verify=True)
    assert pieces_in(flat.cpu(), sending.region) == sending.expected()
    Unpacker(sending.region, flat.cpu()).check(5, packed.seal)


def test_a_weight_that_is_not_a_number_stays_none() -> None:
    sending = two_tensors()
    sending.sources["q"][2, 1] = math.nan
    flat, _ = written(sending, 5, verify=True)
    assert sending.region.pieces[0].view(flat).isnan().nonzero().tolist() == [[2, 1]]


@given(sendings(), st.data())
@settings(max_examples=50, deadline=None)
def test_any_flipped_byte_is_found_and_named(sending: Sending, data: st.DataObject) -> None:
    flat, packed = written(sending, 6, verify=True)
    index = data.draw(st.integers(0, len(sending.region.pieces) - 1))
    piece = sending.region.pieces[index]
    element = [data.draw(st.integers(0, length - 1)) for length in piece.copy.shape]
    size = getattr(torch, piece.copy.dtype).itemsize
    place = piece.offset + size * sum(i * stride for i, stride in zip(element, piece.strides, strict=True))
    flat[place + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VerificationError, match=rf"^version 6 from train rank 4: {piece.copy.tensor} has the digest "):
        Unpacker(sending.region, flat).check(6, packed.seal)


@pytest.mark.parametrize("verify", [True, False])
def test_what_a_write_announces_is_in_memory_for_every_other_stream(verify: bool) -> None:
    """A reader in another process takes part in none of our streams."""
    gpu = on_gpu(two_tensors())
    flat = allocate(gpu.region.num_bytes, CUDA)
    packer = Packer(gpu.region, flat, gpu.sources)
    reader = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES // 10)
    for source in gpu.sources.values():  # the optimiser's step, still under way when the write is asked for
        source.add_(100)
    packed = packer.write(3, verify)
    with torch.cuda.stream(reader):
        found = flat.cpu()
    expected = two_tensors()
    for source in expected.sources.values():
        source.add_(100)
    assert pieces_in(found, expected.region) == expected.expected()
    Unpacker(expected.region, found).check(3, packed.seal)


@pytest.mark.parametrize("verify", [True, False])
def test_a_write_waits_for_its_own_stream_alone(verify: bool) -> None:
    """Another may be stuck in a broadcast with a process that has died, or busy decoding."""
    gpu = on_gpu(two_tensors())
    flat = allocate(gpu.region.num_bytes, CUDA)
    packer = Packer(gpu.region, flat, gpu.sources)
    unpacker = Unpacker(gpu.region, flat)
    landed = FusedCopy([(view.clone(), view) for view in unpacker.views])
    packer.write(1, verify)
    landed.run(verify)
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(LONG_CYCLES)
    end = busy.record_event()
    unpacker.check(3, packer.write(3, verify).seal)
    landed.run(verify)
    assert not end.query()
    end.synchronize()


def test_memory_is_zero_when_it_is_handed_out() -> None:
    """Whoever writes it next may do so on another stream, or from another process."""
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES // 10)
    flat = allocate(1 << 20, CUDA)
    with torch.cuda.stream(torch.cuda.Stream()):
        flat.fill_(7)
        torch.cuda.current_stream().synchronize()
    torch.cuda.synchronize()
    assert bool((flat == 7).all())
