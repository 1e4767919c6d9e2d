"""Which host this is and which process, told apart from all others before and after it. Needs no torch."""

import os
import pathlib
from dataclasses import dataclass

import psutil


def started_ticks(pid: int) -> int:
    """When a process began, in clock ticks since the machine's boot, which setting the clock does not move."""
    return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def host_identity() -> str:
    """Equal in two processes only if each can see the other in /proc: the machine's boot and the pid namespace."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{pathlib.Path('/proc/self/ns/pid').stat().st_ino}"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from all others that ever had its id by when it started; the clock may change."""

    pid: int
    started_ticks: int

    @classmethod
    def this_process(cls) -> "Owner":
        return cls(os.getpid(), started_ticks(os.getpid()))

    def is_alive(self) -> bool:
        try:
            same = started_ticks(self.pid) == self.started_ticks
            return same and psutil.Process(self.pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            return False
