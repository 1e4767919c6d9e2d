import os
import pathlib
import stat
import subprocess
import tempfile
from typing import Any

import pytest

from tests.unit.transport.children import Child, child
from transport.host import Owner, started_ticks
from transport.run_folder import make_run_folder, remove_dead_folders, remove_run_folder

a_child = pytest.fixture(child)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# What a child does.


def make(state: dict[str, Any], tempdir: str, name: str) -> pathlib.Path:
    tempfile.tempdir = tempdir
    folder = make_run_folder(name)
    (folder / "socket").touch()
    return folder


def test_nobody_else_can_look_into_the_folder_and_its_name_tells_its_owner():
    folder = make_run_folder("9e107d9d-0-rank1")
    owner = Owner.this_process()
    assert folder.name == f"9e107d9d-0-rank1.{os.getpid()}.{owner.started_ticks}"
    for place in (folder, folder.parent):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    remove_run_folder(folder)
    assert not folder.exists()


def test_the_next_folder_removes_what_dead_processes_left_and_only_that(a_child: Child, tmp_path: pathlib.Path):
    ours = make_run_folder("ours")
    theirs = a_child.call(make, str(tmp_path), "theirs")
    others = [ours.parent / name for name in ("notes", f"a.{os.getpid()}", "b.1.2.3x", "c d.1.1")]
    for other in others:
        other.mkdir()
    reused = ours.parent / f"reused.{os.getpid()}.{Owner.this_process().started_ticks - 1}"
    reused.mkdir()
    make_run_folder("second")
    assert not reused.exists(), "its process id is ours, but its owner started before us"
    assert theirs.exists()
    a_child.kill()
    make_run_folder("third")
    assert not theirs.exists()
    assert ours.exists()
    assert all(other.exists() for other in others)
    assert remove_dead_folders() == []


def test_a_process_that_ended_is_dead_before_its_parent_has_noticed():
    ended = subprocess.Popen(["sleep", "60"])
    owner = Owner(ended.pid, started_ticks(ended.pid))
    assert owner.is_alive()
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert started_ticks(ended.pid) == owner.started_ticks
    assert not owner.is_alive()
    ended.wait()
    assert not owner.is_alive()


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str):
    with pytest.raises(ValueError, match="becomes a folder"):
        make_run_folder(name)


def test_a_place_that_somebody_else_made_is_refused(monkeypatch: pytest.MonkeyPatch):
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(PermissionError, match="is not a folder of this user alone"):
        make_run_folder("a")


def test_a_place_that_others_can_reach_is_refused(tmp_path: pathlib.Path):
    base = make_run_folder("a").parent
    base.chmod(0o750)
    with pytest.raises(PermissionError, match=f"{base} is not a folder of this user alone"):
        make_run_folder("b")
    for folder in base.iterdir():
        folder.rmdir()
    base.rmdir()
    base.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="is not a folder of this user alone"):
        make_run_folder("c")
