"""Folders for what a process keeps in the file system while it lives, such as its sockets.

    /tmp/rayfit-1000-5f3c9a12/9e107d9d-0-rank1.4711.8826443/
         user ^    ^ host     ^ name           ^ pid  ^ start of the process, in clock ticks since boot

Nobody else may look into them (mode 0700). What a process that was killed has left behind is removed when the next
folder is made: only where the name says that the owner is gone, and only where a process id means the same here as it
meant to the owner (one boot, one pid namespace).
"""

import hashlib
import os
import pathlib
import re
import shutil
import tempfile

from configs.schema import NAME_PATTERN
from transport.host import Owner, host_identity

FOLDER_PATTERN = re.compile(rf"{NAME_PATTERN.pattern}\.(?P<pid>[0-9]+)\.(?P<started_ticks>[0-9]+)")


def make_run_folder(name: str) -> pathlib.Path:
    """A new folder of this process, after what dead processes left has been removed.

    Raises:
        ValueError: the name is not fit for a file name.
        PermissionError: somebody else has made the folder that it would lie in.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{name!r} becomes a folder: use letters, digits, '.', '_' and '-'")
    base = _base()
    remove_dead_folders()
    owner = Owner.this_process()
    folder = base / f"{name}.{owner.pid}.{owner.started_ticks}"
    folder.mkdir(mode=0o700)
    return folder


def remove_run_folder(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a socket may vanish by itself meanwhile


def remove_dead_folders() -> list[pathlib.Path]:
    """Remove this user's folders whose owner is gone. Returns them."""
    removed = []
    for folder in _base().iterdir():
        match = FOLDER_PATTERN.fullmatch(folder.name)
        if match and not Owner(int(match["pid"]), int(match["started_ticks"])).is_alive():
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too
            removed.append(folder)
    return removed


def _base() -> pathlib.Path:
    host = hashlib.sha256(host_identity().encode()).hexdigest()[:8]
    base = pathlib.Path(tempfile.gettempdir()) / f"rayfit-{os.getuid()}-{host}"
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()  # a link is open to everybody
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{base} is not a folder of this user alone: remove it, or set TMPDIR to another place")
    return base
