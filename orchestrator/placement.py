"""Where the actors run: a placement group per role, of GPUs or of fractions of a CPU."""

import asyncio
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from orchestrator.errors import PlacementFailed

LOCAL_CPUS_PER_WORKER = 1


def choose_device(wanted: Literal["auto", "cpu", "cuda"], num_gpus: int) -> Literal["cpu", "cuda"]:
    """The device of train, rollout and reference workers.

    Raises:
        PlacementFailed: CUDA was asked for and the cluster has fewer than `num_gpus` GPUs.
    """
    available = int(ray.cluster_resources().get("GPU", 0))
    if wanted == "cuda" and available < num_gpus:
        raise PlacementFailed(
            f"cluster.device=cuda needs {num_gpus} GPUs, the cluster has {available}: lower trainer.num_workers or "
            "rollout.num_workers, or set cluster.device=cpu"
        )
    return "cuda" if wanted != "cpu" and available >= num_gpus else "cpu"


async def place(role: str, num_workers: int, device: Literal["cpu", "cuda"], deadline_s: float) -> PlacementGroup:
    """A bundle per worker, packed on as few nodes as possible.

    Raises:
        PlacementFailed: the cluster could not reserve the bundles before the deadline.
    """
    bundle: dict[str, float] = {"CPU": LOCAL_CPUS_PER_WORKER}
    if device == "cuda":
        bundle["GPU"] = 1
    group = placement_group([bundle] * num_workers, strategy="PACK")
    if not await asyncio.to_thread(group.wait, deadline_s):
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise PlacementFailed(
            f"{role}: {num_workers} bundles of {bundle} were not free within {deadline_s:.0f} s; free: {free}"
        )
    return group


def actor_options(device: Literal["cpu", "cuda"], **more: Any) -> dict[str, Any]:
    """Ray options of a worker that fills its bundle."""
    return {"num_cpus": LOCAL_CPUS_PER_WORKER, "num_gpus": 1 if device == "cuda" else 0} | more
