"""Proof that a refit arrived: a digest of the bytes where they were written, compared where they have landed."""

import xxhash

from transport.arena import Arena


def digest(arena: Arena) -> str:
    """xxh3_128 of the arena's bytes: finds every changed, moved or missing byte, at half the cost of a memcpy."""
    return xxhash.xxh3_128_hexdigest(arena.flat.cpu().numpy().data)


class VerificationError(RuntimeError):
    """The bytes that landed are not those that were written; the message names the rank and the version."""


def verify(arena: Arena, expected: str, rank: int, version: int) -> None:
    """Raises VerificationError unless the arena's digest is the expected one."""
    actual = digest(arena)
    if actual != expected:
        raise VerificationError(f"version {version} from train rank {rank}: digest {actual}, published as {expected}")
