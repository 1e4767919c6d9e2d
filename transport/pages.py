"""Mappings of a shared file in huge pages: with small ones a pass over a large buffer takes half as long again.

The kernel gives shared memory no huge pages by itself where `shmem_enabled` is "never", as it mostly is, but collects
those of a mapping that asks for it (MADV_COLLAPSE, Linux 6.1) and whose address and file offset agree: so the address
is chosen here. Where it refuses, the pages stay small.
"""

import ctypes
import mmap
import os
import weakref

import torch

HUGE_PAGE_BYTES = 2 << 20
MADV_COLLAPSE = 25
MAP_FIXED = 0x10
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_shared(descriptor: int, num_bytes: int, writable: bool) -> torch.Tensor:
    """The file's first `num_bytes` as a flat uint8 tensor, every page present. Read-only: a write ends the process.

    The mapping goes when the tensor and all its views have gone.

    Raises:
        OSError: the kernel refuses, for instance a writable mapping of a sealed file.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    reserved_bytes = num_bytes + HUGE_PAGE_BYTES
    reserved = _map(None, reserved_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        _map(address, num_bytes, protection, mmap.MAP_SHARED | mmap.MAP_POPULATE | MAP_FIXED, descriptor)
    except OSError:
        _libc.munmap(reserved, reserved_bytes)
        raise
    _libc.madvise(address, num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_COLLAPSE)  # at best
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    # Not when the interpreter ends: a thread may still read then, and the kernel takes all mappings in the end.
    weakref.finalize(memory, _libc.munmap, reserved, reserved_bytes).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _libc.mmap(address, num_bytes, protection, flags, descriptor, 0)
    if mapped == MAP_FAILED or mapped is None:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {num_bytes} bytes: {os.strerror(number)}")
    return int(mapped)
