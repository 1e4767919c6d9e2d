"""What a run that was killed leaves behind: no shared memory, and sockets only until the next start removes them."""

import asyncio
import json
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.integration.small_refit import SmallRefit
from transport.run_folder import make_run_folder, remove_dead_folders, remove_run_folder

MEMORY = "memfd:rayfit-weights"


@pytest.mark.parametrize("kind", ["shared_memory", "stream"])
def test_after_a_killed_driver_the_next_start_cleans_what_it_left_and_only_that(kind: str) -> None:
    alive = make_run_folder("alive")
    driver = subprocess.Popen([sys.executable, "-m", __name__, kind], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        shared = set().union(*map(shared_files, pids))
        assert shared
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        wait_until_ended(pids)
        assert not shared & set().union(*map(shared_files, psutil.pids()))
        removed = remove_dead_folders()
        assert all(any(f".{pid}." in folder.name for pid in pids) for folder in removed)
        assert bool(removed) == (kind == "stream")
        assert alive.is_dir()
        assert remove_dead_folders() == []
    finally:
        driver.kill()
        remove_run_folder(alive)


def shared_files(pid: int) -> set[str]:
    """Inodes of the memory of ours that a process has mapped."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if MEMORY in line}


def wait_until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if psutil.pid_exists(pid)]} outlived their driver"
        time.sleep(0.2)


async def refit_and_wait(kind: str) -> None:
    async with SmallRefit(kind, 1, 20.0) as refit:
        await refit.sync.refit(1)
        print(json.dumps(refit.trainer_pids + refit.engine_pids), flush=True)
        await asyncio.sleep(600)


if __name__ == "__main__":
    from orchestrator.driver import start_ray

    start_ray(num_workers=8)
    asyncio.run(refit_and_wait(sys.argv[1]))
