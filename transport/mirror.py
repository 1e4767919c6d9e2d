"""Digests of CUDA memory: it comes to the host through two pinned buffers in turn, one is digested while one fills.

The buffers are made when the first FusedCopy or Unpacker over CUDA memory is, and never within a refit: pinning memory
waits for the whole GPU, and so for a broadcast that may be stuck. All copies go to the caller's stream.

Not yet run.
"""

import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

BUFFER_BYTES = 32 << 20


@dataclass(slots=True)
class _Load:
    """What lies in a buffer: (index of tensor, its bytes), back to back."""

    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    num_bytes: int = 0


class Mirror:
    def __init__(self, buffer_bytes: int = BUFFER_BYTES, pinned: bool = True) -> None:
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._lock = threading.Lock()

    def digests(self, tensors: Sequence[torch.Tensor]) -> list[bytes]:
        """xxh3_128 of each tensor's bytes, as they are after what the caller's stream has been given so far."""
        hashers = [xxhash.xxh3_128() for _ in tensors]
        with self._lock:
            before: tuple[torch.Tensor, _Load, torch.cuda.Event | None] | None = None
            for turn, load in enumerate(self._loads(tensors)):
                buffer = self._buffers[turn % 2]
                filled = _fill(buffer, load)
                if before is not None:
                    _digest(*before, hashers)
                before = (buffer, load, filled)
            if before is not None:
                _digest(*before, hashers)
        return [hasher.digest() for hasher in hashers]

    def _loads(self, tensors: Iterable[torch.Tensor]) -> Iterator[_Load]:
        load = _Load()
        for index, tensor in enumerate(tensors):
            rest = tensor.contiguous().view(-1).view(torch.uint8)
            while rest.numel():
                room = self._buffers[0].numel() - load.num_bytes
                if room == 0:
                    yield load
                    load = _Load()
                    continue
                load.parts.append((index, rest[:room]))
                load.num_bytes += load.parts[-1][1].numel()
                rest = rest[room:]
        if load.parts:
            yield load


def _fill(buffer: torch.Tensor, load: _Load) -> torch.cuda.Event | None:
    """Start the copies; returns the event of their end, None on a CPU."""
    start = 0
    for _, part in load.parts:
        buffer[start : start + part.numel()].copy_(part, non_blocking=True)
        start += part.numel()
    first = load.parts[0][1]
    return torch.cuda.current_stream(first.device).record_event() if first.is_cuda else None


def _digest(buffer: torch.Tensor, load: _Load, filled: torch.cuda.Event | None, hashers: list[xxhash.xxh3_128]) -> None:
    if filled is not None:
        filled.synchronize()
    host, start = buffer.numpy(), 0
    for index, part in load.parts:
        hashers[index].update(host[start : start + part.numel()].data)
        start += part.numel()


@functools.cache
def mirror() -> Mirror:
    """The process's own."""
    return Mirror()
