"""Proof that a refit arrived: a digest per tensor, taken where the bytes are written and again where they have landed.

The digests travel with the bytes, in a receipt behind the pieces of a Region: a version, their count, and 16 bytes per
piece in plan order. The orchestrator carries only a digest of the receipt (its seal), by another way than the bytes. A
receipt's version is withdrawn before the first byte of another version is written, so that a reader who comes late
finds out, verified or not.
"""

import struct

import numpy as np
import torch
import xxhash

from transport.arena import DIGEST_BYTES, RECEIPT_HEADER_BYTES, Region

HEADER = struct.Struct("<qq")
WITHDRAWN = -1

digest = xxhash.xxh3_128_digest
"""Finds every changed, moved or missing byte, at half the cost of a memcpy."""


class VerificationError(RuntimeError):
    """The bytes that landed are not those that were written; the message names tensor, train rank and version."""


def write_receipt(flat: torch.Tensor, region: Region, version: int, digests: bytes) -> bytes:
    """Declare the region's pieces to be `version`. Returns the seal; `digests` is empty where nobody verifies."""
    receipt = HEADER.pack(version, len(digests) // DIGEST_BYTES) + digests
    _write(flat, region.receipt_offset, receipt)
    return digest(receipt)


def withdraw_receipt(flat: torch.Tensor, region: Region) -> None:
    """The region's pieces are about to change: from now on they are no version."""
    _write(flat, region.receipt_offset, HEADER.pack(WITHDRAWN, 0))


def check_version(flat: torch.Tensor, region: Region, version: int) -> None:
    """Raises VerificationError unless the region holds `version`, whole."""
    found, _ = HEADER.unpack(_read(flat, region.receipt_offset, RECEIPT_HEADER_BYTES))
    if found != version:
        held = "a version that is being written" if found == WITHDRAWN else f"version {found}"
        raise VerificationError(f"version {version} from train rank {region.source_rank}: its region holds {held}")


def check_digests(flat: torch.Tensor, region: Region, version: int, seal: bytes, landed: list[bytes]) -> None:
    """Compare the digest of every piece that landed with the receipt.

    Raises:
        VerificationError: naming the first tensor that differs, or the receipt itself.
    """
    where = f"version {version} from train rank {region.source_rank}"
    receipt = _read(flat, region.receipt_offset, RECEIPT_HEADER_BYTES + len(region.pieces) * DIGEST_BYTES)
    if digest(receipt) != seal:
        raise VerificationError(f"{where}: the receipt of its digests was changed on the way")
    written = receipt[RECEIPT_HEADER_BYTES:]
    for index, (piece, found) in enumerate(zip(region.pieces, landed, strict=True)):
        expected = written[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if found != expected:
            raise VerificationError(
                f"{where}: {piece.copy.tensor} has the digest {found.hex()}, published as {expected.hex()}"
            )


def _write(flat: torch.Tensor, offset: int, data: bytes) -> None:
    flat[offset : offset + len(data)].copy_(torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()))


def _read(flat: torch.Tensor, offset: int, num_bytes: int) -> bytes:
    return flat[offset : offset + num_bytes].cpu().numpy().tobytes()
