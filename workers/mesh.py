"""The trainer's process group and device mesh.

Rank 0 opens the rendezvous on a port that the system picks, so two runs on one host never fight for one; the others
connect to it. The group is torch's default group: nothing else of Rayfit may use that.
"""

import datetime
import os

import ray
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def open_rendezvous(world_size: int, timeout_s: float) -> tuple[dist.TCPStore, str]:
    """The store that rank 0 serves, and its "host:port"."""
    host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
    store = dist.TCPStore(
        host, 0, world_size, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_s)
    )
    return store, f"{host}:{store.port}"


def join_mesh(
    store: dist.TCPStore | None, address: str, rank: int, world_size: int, device: str, timeout_s: float
) -> DeviceMesh:
    """Join the default process group and return its one-dimensional mesh, axis "dp".

    Args:
        store: rank 0's own store, None on the other ranks.
        device: "cpu" (gloo) or "cuda" (nccl); with cuda, the actor sees exactly its own GPU.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    if store is None:
        host, _, port = address.rpartition(":")
        store = dist.TCPStore(host, int(port), world_size, is_master=False, timeout=timeout)
    if address.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return init_device_mesh(device, (world_size,), mesh_dim_names=("dp",))
