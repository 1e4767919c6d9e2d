"""Memory that processes of one host share without a name: nothing is left behind, however a process ends.

The owner makes an anonymous file and tells others where it is (Handle); they open it through /proc. Once every writer
has mapped it, the owner seals it: nobody can map it for writing, shrink or grow it any more, so a reader can neither
write weights nor die of a truncated file. The limit of /dev/shm in a container does not apply.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
from dataclasses import dataclass

import torch

from transport.arena import aligned
from transport.host import started_ticks
from transport.pages import map_shared


@dataclass(frozen=True, slots=True)
class Handle:
    """An owner's open file: its process, since when that runs, the descriptor, and the file's inode and size."""

    pid: int
    started_ticks: int
    descriptor: int
    inode: int
    num_bytes: int


class SharedMemoryUnavailable(OSError):  # noqa: N818
    """The owner's memory cannot be opened from this process; the message says why."""


class SharedBuffer:
    """The owner's mapping: `flat` (uint8), writable, every page touched."""

    def __init__(self, num_bytes: int) -> None:
        num_bytes = max(aligned(num_bytes, mmap.PAGESIZE), mmap.PAGESIZE)
        self._descriptor = os.memfd_create("rayfit-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        self.flat = map_shared(self._descriptor, num_bytes, writable=True)
        inode = os.fstat(self._descriptor).st_ino
        self.handle = Handle(os.getpid(), started_ticks(os.getpid()), self._descriptor, inode, num_bytes)

    def seal(self) -> None:
        """From now on no process can map the file for writing, or change its size."""
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        if fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS) != seals:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Close the file; the memory goes when the last mapping does."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


F_SEAL_FUTURE_WRITE = 0x10


def open_buffer(handle: Handle, writable: bool) -> torch.Tensor:
    """Map the owner's memory, whole, as a flat uint8 tensor. Read-only: a write to it ends the process.

    Raises:
        SharedMemoryUnavailable: the owner is gone, or this process may not look into it.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.descriptor}", access | os.O_CLOEXEC)
    except OSError as error:
        raise SharedMemoryUnavailable(f"the memory of process {handle.pid} cannot be opened: {error}") from error
    try:
        # A process id is used again after its process has ended, a descriptor even sooner.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if started_ticks(handle.pid) == handle.started_ticks and os.fstat(descriptor).st_ino == handle.inode:
                return map_shared(descriptor, handle.num_bytes, writable)
        raise SharedMemoryUnavailable(f"process {handle.pid} is not the owner of the memory any more")
    finally:
        os.close(descriptor)


def can_read_memory_of(pid: int, address: int, expected: bytes) -> bool:
    """Whether the kernel lets this process copy another's memory (CMA, by ptrace permission), as NIXL does on one host.

    Args:
        address: where `expected` lies in process `pid`.
    """

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    found = ctypes.create_string_buffer(len(expected))
    local = Vector(ctypes.addressof(found), len(expected))
    remote = Vector(address, len(expected))
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return False
    size = libc.process_vm_readv(
        ctypes.c_int(pid), ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )  # fmt: skip
    return size == len(expected) and found.raw == expected
