import ctypes
import fcntl
import gc
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.transport.children import Child, child
from transport.host import host_identity, started_ticks
from transport.memfd import (
    Handle,
    SharedBuffer,
    SharedMemoryUnavailable,
    can_read_memory_of,
    open_buffer,
)

a_child = pytest.fixture(child)
another_child = pytest.fixture(child)
State = dict[str, Any]


# What a child does.


def own(state: State, num_bytes: int, value: int) -> Handle:
    state["buffer"] = SharedBuffer(num_bytes)
    state["buffer"].flat.fill_(value)
    return state["buffer"].handle


def open_it(state: State, handle: Handle, writable: bool) -> list[int]:
    state["flat"] = open_buffer(handle, writable)
    return state["flat"][:3].tolist()


def read(state: State) -> list[int]:
    return state["flat"][:3].tolist()


def write(state: State, value: int) -> None:
    state["flat"][:3] = value


def seal(state: State) -> None:
    state["buffer"].seal()


def resize(state: State, handle: Handle, num_bytes: int) -> None:
    os.truncate(f"/proc/{handle.pid}/fd/{handle.descriptor}", num_bytes)


def write_file(state: State, handle: Handle) -> None:
    with pathlib.Path(f"/proc/{handle.pid}/fd/{handle.descriptor}").open("r+b", buffering=0) as file:
        file.write(b"\0")


def identity(state: State) -> tuple[str, int]:
    return host_identity(), os.getpid()


def remember(state: State, data: bytes) -> int:
    state["memory"] = ctypes.create_string_buffer(data, len(data))
    return ctypes.addressof(state["memory"])


def test_a_buffer_is_whole_pages_of_zeros():
    buffer = SharedBuffer(1)
    assert (buffer.flat.numel(), buffer.handle.num_bytes) == (mmap.PAGESIZE, mmap.PAGESIZE)
    assert buffer.flat.count_nonzero() == 0
    assert SharedBuffer(mmap.PAGESIZE + 1).flat.numel() == 2 * mmap.PAGESIZE


@pytest.mark.parametrize("sealed", [False, True])
def test_what_the_owner_writes_is_seen_at_once_by_every_reader(sealed: bool, a_child: Child, another_child: Child):
    buffer = SharedBuffer(8192)
    buffer.flat[:3] = torch.tensor([7, 8, 9])
    if sealed:
        buffer.seal()
    for reader in (a_child, another_child):
        assert reader.call(open_it, buffer.handle, False) == [7, 8, 9]
    buffer.flat[:3] = 1  # the owner's mapping is older than the seal
    for reader in (a_child, another_child):
        assert reader.call(read) == [1, 1, 1]


def test_writers_that_mapped_the_memory_before_the_seal_go_on_writing(a_child: Child):
    buffer = SharedBuffer(4096)
    a_child.call(open_it, buffer.handle, True)
    buffer.seal()
    a_child.call(write, 5)
    assert buffer.flat[:4].tolist() == [5, 5, 5, 0]


@pytest.mark.parametrize("sealed", [False, True])
def test_a_reader_that_writes_dies_and_changes_nothing(sealed: bool, a_child: Child):
    buffer = SharedBuffer(4096)
    if sealed:
        buffer.seal()
    a_child.call(open_it, buffer.handle, False)
    with pytest.raises(EOFError):
        a_child.call(write, 5)
    a_child.process.join(10)
    assert a_child.process.exitcode == -signal.SIGSEGV
    assert buffer.flat[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda handle: (open_it, handle, True),
        lambda handle: (write_file, handle),
        lambda handle: (resize, handle, 4096),
        lambda handle: (resize, handle, 0),
        lambda handle: (resize, handle, 16384),
    ],
    ids=["map", "write", "shrink", "empty", "grow"],
)
def test_sealed_memory_can_be_neither_written_nor_resized(attempt: Callable[[Handle], Any], a_child: Child):
    buffer = SharedBuffer(8192)
    buffer.flat.fill_(3)
    buffer.seal()
    with pytest.raises(PermissionError):
        a_child.call(*attempt(buffer.handle))
    assert os.fstat(buffer.handle.descriptor).st_size == 8192
    assert buffer.flat.unique().tolist() == [3]
    # Not so before the seal: this is what it forbids.
    open_one = SharedBuffer(8192)
    a_child.call(*attempt(open_one.handle))


def test_a_seal_is_for_ever_and_the_second_one_does_nothing():
    buffer = SharedBuffer(4096)
    buffer.seal()
    buffer.seal()
    with pytest.raises(PermissionError):
        fcntl.fcntl(buffer.handle.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize("wrong", ["started_ticks", "inode"])
@pytest.mark.parametrize("writable", [False, True])
def test_a_handle_of_another_process_or_file_under_the_same_numbers_is_refused(wrong: str, writable: bool):
    handle = SharedBuffer(4096).handle
    open_buffer(handle, writable)
    stale = replace(handle, **{wrong: getattr(handle, wrong) - 1})
    with pytest.raises(SharedMemoryUnavailable, match=f"process {os.getpid()} is not the owner of the memory any more"):
        open_buffer(stale, writable)


def test_a_descriptor_that_has_become_another_file_is_refused():
    first = SharedBuffer(4096)
    handle = first.handle
    first.close()
    second = SharedBuffer(4096)  # the number is free again
    assert second.handle.descriptor == handle.descriptor
    with pytest.raises(SharedMemoryUnavailable, match="is not the owner of the memory any more"):
        open_buffer(handle, writable=False)


def test_closed_memory_cannot_be_opened():
    buffer = SharedBuffer(4096)
    buffer.close()
    buffer.close()
    with pytest.raises(SharedMemoryUnavailable, match=f"the memory of process {os.getpid()} cannot be opened"):
        open_buffer(buffer.handle, writable=False)


def test_the_memory_of_another_process_is_not_found_under_its_number(a_child: Child):
    handle = SharedBuffer(4096).handle
    with pytest.raises(SharedMemoryUnavailable):
        open_buffer(replace(handle, pid=a_child.process.pid), writable=False)


def test_when_a_process_began_is_the_same_for_everybody_and_differs_between_processes(a_child: Child):
    _, pid = a_child.call(identity)
    # Field 22 of /proc/PID/stat, counted by hand: the command in brackets is the second and may hold blanks.
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    assert str(started_ticks(pid)) == stat[stat.rindex(")") :].split()[22 - 2]
    assert started_ticks(pid) > started_ticks(os.getpid())


def test_a_process_whose_name_looks_like_fields_began_when_it_did():
    began = started_ticks(os.getpid())
    name = pathlib.Path("/proc/self/comm")
    before = name.read_text()
    try:
        name.write_text("a) 1 (2 3")
        assert started_ticks(os.getpid()) == began
    finally:
        name.write_text(before)


def test_a_killed_owner_leaves_its_readers_their_pages_and_nothing_else(a_child: Child):
    handle = a_child.call(own, 8192, 6)
    a_child.call(seal)
    flat = open_buffer(handle, writable=False)
    # Nobody can have to clean up what has no name.
    link = pathlib.Path(f"/proc/{handle.pid}/fd/{handle.descriptor}")
    assert str(link.readlink()) == "/memfd:rayfit-weights (deleted)"
    a_child.kill()
    assert flat.unique().tolist() == [6]
    with pytest.raises(SharedMemoryUnavailable, match=f"the memory of process {handle.pid} cannot be opened"):
        open_buffer(handle, writable=False)
    named = pathlib.Path("/dev/shm")
    assert not named.exists() or not [path for path in named.iterdir() if path.stat().st_ino == handle.inode]
    assert not named.exists() or not [path for path in named.iterdir() if "rayfit-weights" in path.name]


def mappings() -> int:
    return pathlib.Path("/proc/self/maps").read_text().count("/memfd:rayfit-weights")


def test_a_mapping_goes_with_the_last_view_of_it():
    gc.collect()
    before = mappings()
    buffer = SharedBuffer(4096)
    flat = open_buffer(buffer.handle, writable=False)
    view = flat[64:72].view(torch.float32)
    del flat
    assert view.tolist() == [0.0, 0.0]
    assert mappings() == before + 2
    del view
    gc.collect()
    assert mappings() == before + 1


def test_what_runs_while_a_process_ends_may_still_read():
    # Functions for the end run in reverse order: this one after whatever a mapping asks for.
    script = """
        import atexit
        atexit.register(lambda: print(sum(bytes(memory))))
        from transport.memfd import SharedBuffer
        flat = SharedBuffer(4096).flat.fill_(1)
        memory = flat.numpy().data
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"4096\n", b"")


def test_processes_of_one_host_have_one_identity(a_child: Child):
    theirs, pid = a_child.call(identity)
    assert pid != os.getpid()
    assert theirs == host_identity()


def test_a_host_is_one_boot_and_one_process_namespace():
    boot, namespace = host_identity().split("/")
    assert boot == pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert namespace in str(pathlib.Path("/proc/self/ns/pid").readlink())


def test_a_childs_memory_can_be_read_where_its_bytes_are_as_expected(a_child: Child):
    expected = b"sixteen bytes 16"
    address, pid = a_child.call(remember, expected), a_child.process.pid
    assert pid is not None
    assert can_read_memory_of(pid, address, expected)
    assert not can_read_memory_of(pid, address, b"Sixteen bytes 16")
    assert not can_read_memory_of(pid, address, expected[::-1])
    assert not can_read_memory_of(pid, 0, expected)  # nothing is mapped there


def test_the_memory_of_a_process_that_has_ended_cannot_be_read(a_child: Child):
    address, pid = a_child.call(remember, b"sixteen bytes 16"), a_child.process.pid
    a_child.kill()
    assert pid is not None
    assert not can_read_memory_of(pid, address, b"sixteen bytes 16")
