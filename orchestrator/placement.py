"""Where the actors run: a placement group per role, of GPUs or of fractions of a CPU."""

import asyncio
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from configs.load import ConfigurationError
from orchestrator.errors import PlacementFailed

CPUS_PER_WORKER = 1


def choose_device(wanted: Literal["auto", "cpu", "cuda"], num_gpus: float) -> Literal["cpu", "cuda"]:
    """The device of train, rollout and reference workers: with "auto", CUDA if the cluster has any GPU.

    Raises:
        ConfigurationError: the cluster has fewer than `num_gpus` GPUs.
    """
    available = ray.cluster_resources().get("GPU", 0)
    if wanted == "cpu" or (wanted == "auto" and available == 0):
        return "cpu"
    if available < num_gpus:
        raise ConfigurationError(
            f"cluster.device={wanted}: {num_gpus:g} GPUs are needed, the cluster has {available:g}: lower "
            "trainer.num_workers, rollout.num_workers or cluster.gpus_per_worker, or set cluster.device=cpu"
        )
    return "cuda"


async def place(role: str, num_workers: int, gpus_per_worker: float, deadline_s: float) -> PlacementGroup:
    """A bundle per worker, packed on as few nodes as possible.

    Raises:
        PlacementFailed: the cluster could not reserve the bundles before the deadline.
    """
    bundle: dict[str, float] = {"CPU": CPUS_PER_WORKER}
    if gpus_per_worker > 0:
        bundle["GPU"] = gpus_per_worker
    group = placement_group([bundle] * num_workers, strategy="PACK")
    if not await asyncio.to_thread(group.wait, deadline_s):
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        remove_placement_group(group)
        raise PlacementFailed(
            f"{role}: {num_workers} bundles of {bundle} were not free within {deadline_s:.0f} s; free: {free}"
        )
    return group


def actor_options(gpus_per_worker: float, **more: Any) -> dict[str, Any]:
    """Ray options of a worker that fills its bundle."""
    return {"num_cpus": CPUS_PER_WORKER, "num_gpus": gpus_per_worker} | more
