"""Refits of a 0.6B model on one GPU or on two: ours, what other frameworks do, and the GPU speed that bounds both.

`make bench-gpu`, or `.venv-gpu/bin/python -m bench.refit_gpu` with the arguments of bench/refit.py, whose harness,
workload and output it shares. Trainer and engine share one GPU, or have one each if there are two (with
CUDA_VISIBLE_DEVICES=0 they share one on any host). NCCL refuses two ranks on one GPU, so its arms need two.

M is a copy within the GPU of the number of bytes that a refit brings, F a cast of all shards, both by CUDA events. The
engine copies what arrives into its parameters, as a vLLM engine on CUDA does, whose graphs keep their addresses.

Not yet run.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from bench.refit import Rig, run
from bench.refit_memory import ENGINE_DTYPE, copy_bytes
from bench.refit_ours import Kind, our_arms
from bench.refit_rivals import (
    DEADLINE_S,
    Arm,
    Meeting,
    ObjectStoreReceiver,
    ObjectStoreSender,
    RdtReceiver,
    RdtSender,
    Rival,
    broadcast_rival,
)
from bench.refit_sides import EngineSide, Part, TrainerSide

CUDA = torch.device("cuda")
NCCL_BUCKET_BYTES = 256 << 20
GPUS_OF_ONE = 0.5
"""What each process takes of a GPU that both share."""


class CudaTrainerSide(TrainerSide):
    """A trainer's side on its GPU, whose calibrations leave out the host's calls."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts, CUDA)

    def memcpy(self) -> float:
        source = self.flat_shards.view(torch.uint8)[: self.flat.numel()]
        return gpu_seconds(lambda: self.flat.copy_(source))

    def floor(self) -> float:
        return gpu_seconds(lambda: self.flat.view(ENGINE_DTYPE).copy_(self.flat_shards))


def gpu_seconds(work: Callable[[], Any]) -> float:
    """What the GPU takes for the work, by events on the present stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class CudaIpcSender:
    """A CUDA IPC handle per tensor, each cast into memory of its own: how engines that share their trainer's GPU are
    commonly refitted. The tensors of the last refit are freed outside the timing."""

    def __init__(self, side: TrainerSide, meeting: Meeting) -> None:
        self._side = side

    def send(self) -> list[Any]:
        cast = [shard.to(ENGINE_DTYPE) for shard in self._side.shards]
        self._side.leftovers = cast
        return [reduce_tensor(tensor) for tensor in cast]


class CudaIpcReceiver:
    """Maps every tensor and copies it."""

    def __init__(self, side: EngineSide, meeting: Meeting) -> None:
        self._side = side

    def receive(self, handle: Any) -> None:
        mapped = [rebuild(*arguments) for rebuild, arguments in handle]
        copy_bytes(self._side.live, mapped)
        self._side.leftovers = mapped


def nccl_group(meeting: Meeting, rank: int) -> Any:
    """A group of trainer and engine that is not the default one; they meet at the first broadcast."""
    timeout = timedelta(seconds=DEADLINE_S)
    store = torch.distributed.TCPStore("127.0.0.1", meeting.store_port, is_master=False, timeout=timeout)
    prefixed = torch.distributed.PrefixStore("rival_nccl_broadcast", store)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(prefixed, rank, 2, options)


def gpu_arms(num_gpus: int) -> list[Arm]:
    """Every arm that so many GPUs allow, not yet connected."""
    types: list[Kind] = ["nixl", "stream", "object_store"]
    rivals: list[Arm] = [
        Rival("rival_object_store", ObjectStoreSender, ObjectStoreReceiver),
        Rival("rival_rdt_per_tensor", partial(RdtSender, packed=False), RdtReceiver),
        Rival("rival_rdt_packed_fresh", partial(RdtSender, packed=True), RdtReceiver),
        Rival("rival_cuda_ipc_per_tensor", CudaIpcSender, CudaIpcReceiver),
    ]
    if num_gpus > 1:
        types.append("collective")
        rivals.append(broadcast_rival("rival_nccl_broadcast", nccl_group, NCCL_BUCKET_BYTES))
    return [*our_arms(types), *rivals]


def gpu_rig(num_gpus: int) -> Rig:
    """Both processes on one GPU, or one on each of two."""
    options = {"num_gpus": 1.0 if num_gpus > 1 else GPUS_OF_ONE}
    return Rig(CudaTrainerSide, partial(EngineSide, device=CUDA), ("memcpy", "floor"), options)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("refit_gpu: this bench needs a CUDA device; bench/refit.py is the one for a CPU")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1:
        print("one GPU: collective and rival_nccl_broadcast are left out, NCCL needs two", file=sys.stderr)
    run(str(__doc__), gpu_arms(num_gpus), gpu_rig(num_gpus))


if __name__ == "__main__":
    main()
