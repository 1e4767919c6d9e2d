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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from transport import layout
from transport.plan import PlanError


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


def placement_of(name: str, parameter: DTensor, rank: int) -> layout.Placement:
    """Which box of a parameter's global shape this rank holds, as FSDP2, tensor and expert parallelism place it.

    Mesh axes cut one after the other, from the left; FSDP over a tensor-parallel axis cuts what that axis left (torch
    calls it a strided shard), so it comes after the axes to its right. Chunks are torch.chunk's: all of one size except
    the last ones, which may be smaller or empty.

    Raises:
        PlanError: the parameter is kept in a way that is not a box, such as a partial sum.
    """
    mesh, shape = parameter.device_mesh, tuple(parameter.shape)
    start, length = [0] * len(shape), list(shape)
    placements = list(enumerate(parameter.placements))
    strided = [entry for entry in placements if isinstance(entry[1], _StridedShard)]
    for axis, placement in [entry for entry in placements if entry not in strided] + strided[::-1]:
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise PlanError(f"{name}: placement {placement} on mesh axis {axis} is not a shard: a refit needs boxes")
        dimension = placement.dim
        chunk = -(-length[dimension] // mesh.size(axis))
        begin = min(mesh.get_local_rank(axis) * chunk, length[dimension])
        start[dimension] += begin
        length[dimension] = min(chunk, length[dimension] - begin)
    box = layout.Box(tuple(start), tuple(length))
    local = tuple(parameter.to_local().shape)
    if box.size > 0 and local != box.shape:
        raise PlanError(f"{name}: placements {parameter.placements} make a shard of {box.shape}, it is {local}")
    shards = (layout.Shard(rank, box, (0,) * len(shape)),) if box.size > 0 else ()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return layout.Placement(name, shape, name, dtype, shards)
