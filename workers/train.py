"""A train worker: one rank of the trainer, driven by the orchestrator; every rank gets the same calls in order.

`forward_backward` accumulates gradients, `optim_step` applies them, `publish` writes this rank's own shards, cast to
the engine's dtype, into its arena. No rank ever gathers the model for a refit.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from configs.schema import ModelConfig, TrainerConfig
from transport.auto import Probe, Site
from transport.base import Offers
from transport.layout import Layout, share
from transport.types import Metrics, Microbatch
from workers.checkpoint import load_optimizer, save_optimizer, save_policy
from workers.mesh import join_mesh, open_rendezvous, placement_of
from workers.model import Policy, build_model, join_shards, shard
from workers.weights import Outlet, Publication, WeightSender
from workers.worker import Worker

Loss = Callable[[torch.Tensor, Microbatch], tuple[torch.Tensor, Metrics]]
"""(logprobs_N, microbatch) -> (loss summed over its tokens, metrics). The worker divides by the global token count."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a worker needs to build its shard of a policy."""

    model: ModelConfig
    folder: str
    pretrained: bool
    seed: int
    temperature: float
    device: str
    timeout_s: float


class PolicyWorker(Worker):
    """A rank that holds a shard of a policy and computes logprobs; as it stands, the reference policy."""

    def __init__(self, rank: int, world_size: int, spec: PolicySpec) -> None:
        torch.set_num_threads(1)
        self.rank, self.world_size, self.spec = rank, world_size, spec
        self._store: dist.TCPStore | None = None

    def rendezvous(self) -> str:
        """Called on rank 0 only: the address that every rank passes to `setup`."""
        self._store, address = open_rendezvous(self.world_size, self.spec.timeout_s)
        return address

    def setup(self, address: str) -> int:
        """Join the mesh and build the policy's shard. Returns the number of parameters of the whole policy."""
        spec = self.spec
        self._mesh = join_mesh(self._store, address, self.rank, self.world_size, spec.device, spec.timeout_s)
        self._device = torch.device(spec.device)
        model = build_model(spec.model, spec.folder, spec.pretrained, spec.seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        self.policy = shard(Policy(model, spec.temperature), self._mesh, spec.model.compute_dtype)
        join_shards(self.policy)
        self._fsdp = cast(FSDPModule, self.policy)
        # FSDP swaps a module's parameters while it is gathered; these sharded ones are the masters throughout.
        prefix = "model."
        self.parameters: dict[str, Any] = {  # of DTensor parameters
            name.removeprefix(prefix): parameter for name, parameter in self.policy.named_parameters()
        }
        return size

    @torch.no_grad()
    def logprobs(self, microbatches: list[Microbatch]) -> list[Any]:
        """This policy's logprobs_N of each microbatch, as NumPy arrays."""
        return [self.policy(self._to_device(batch))[0].float().cpu().numpy() for batch in microbatches]

    def _to_device(self, batch: Microbatch) -> Microbatch:
        arrays = {name: getattr(batch, name) for name in Microbatch.__slots__ if name != "num_global_tokens"}
        tensors: dict[str, Any] = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        return dataclasses.replace(batch, **tensors)


class TrainWorker(PolicyWorker):
    """A PolicyWorker that learns and publishes."""

    def setup(self, address: str) -> int:
        size = super().setup(address)
        self.weight_version = -1
        self._dirty = True
        self._probe = Probe(self._device.type)
        shards = {name: parameter.to_local().detach() for name, parameter in self.parameters.items()}
        self._sender = WeightSender(shards, self._device)
        return size

    def configure_optimizer(self, config: TrainerConfig, total_steps: int) -> None:
        """A fresh AdamW; `total_steps` optimiser steps is where the learning-rate schedule ends."""
        self._config, self._total_steps, self._optim_steps = config, total_steps, 0
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            foreach=True,
        )

    def forward_backward(self, microbatches: list[Microbatch], loss: Loss) -> Metrics:
        """Add the gradient of `loss` over these microbatches, the same number on every rank.

        Args:
            loss: summed over a microbatch's tokens; divided here by the minibatch's global token count, so that the
                gradient does not depend on how tokens are split over microbatches and ranks.
        """
        metrics = Metrics()
        for index, numpy_batch in enumerate(microbatches):
            batch = self._to_device(numpy_batch)
            self._fsdp.set_requires_gradient_sync(index == len(microbatches) - 1)
            logprobs_N, entropies_N = self.policy(batch)
            summed, loss_metrics = loss(logprobs_N, batch)
            # FSDP averages gradients over ranks; the loss is a sum over ranks.
            (summed * (self.world_size / batch.num_global_tokens)).backward()
            metrics.merge(loss_metrics)
            metrics.add("loss", summed.item(), len(logprobs_N))
            metrics.add("entropy", entropies_N.sum().item(), len(entropies_N))
            self._compare_with_sampler(metrics, logprobs_N.detach(), batch)
        return metrics

    def _compare_with_sampler(self, metrics: Metrics, logprobs_N: torch.Tensor, batch: Microbatch) -> None:
        """Tokens sampled under exactly these weights must have the logprob that the engine gave them."""
        if self._dirty:
            return
        differences = (logprobs_N - batch.logprobs_N).abs()[batch.versions_N == self.weight_version]
        if len(differences) > 0:
            metrics.add("logprob_diff/mean", differences.sum().item(), len(differences))
            metrics.maximum("logprob_diff/max", differences.max().item())

    def optim_step(self) -> Metrics:
        """Clip, step and clear the gradients.

        Raises:
            FloatingPointError: the gradient is not finite, on every rank alike; no weight was changed.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        norm_value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if not math.isfinite(norm_value):
            raise FloatingPointError(
                f"the gradient's norm is {norm_value} at optimiser step {self._optim_steps + 1}; no weight was changed"
            )
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self._config.max_grad_norm, norm)
        rate = learning_rate(self._config, self._optim_steps, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._optim_steps += 1
        self._dirty = True
        metrics = Metrics()
        metrics.maximum("grad_norm", norm_value)
        metrics.maximum("learning_rate", rate)
        return metrics

    def gradients(self) -> dict[str, Any]:
        """Full gradients by name, as NumPy arrays on every rank; for tests of invariant 5."""
        return {name: parameter.grad.full_tensor().cpu().numpy() for name, parameter in self.parameters.items()}

    def layout(self) -> Layout:
        """Which box of each parameter this rank holds."""
        return share([placement_of(name, parameter, self.rank) for name, parameter in self.parameters.items()])

    def site(self) -> Site:
        """Where this rank is, for engines that may share its memory."""
        return self._probe.site

    def open_channels(self, outlets: list[Outlet]) -> dict[str, Any]:
        """Make the buffers that every refit reuses. Returns what this rank offers, by channel."""
        return self._sender.open(outlets)

    def attach(self, offers: dict[str, Offers]) -> None:
        """Reach the other ranks, by channel."""
        self._sender.attach(offers)

    def publish(self, version: int, verify: bool) -> Publication:
        """Write this rank's shards as weight version `version`, on every channel."""
        publication = self._sender.publish(version, verify)
        self.weight_version, self._dirty = version, False
        return publication

    def save(self, folder: str, tokenizer_folder: str) -> None:
        """Write the policy as a Hugging Face folder (`policy/`) and the optimiser's state (`optimizer/`)."""
        save_policy(self.policy.model, self.parameters, folder, tokenizer_folder, self.rank)
        save_optimizer(self.policy, self._optimizer, folder)

    def save_policy(self, folder: str, tokenizer_folder: str) -> None:
        """Write the policy alone."""
        save_policy(self.policy.model, self.parameters, folder, tokenizer_folder, self.rank)

    def load_optimizer(self, folder: str, optim_steps: int) -> None:
        """Read the optimiser's state that `save` wrote; the weights come from `folder`/policy at setup."""
        load_optimizer(self.policy, self._optimizer, folder)
        self._optim_steps = optim_steps
        config = self._config  # the run's present keys, not those it was saved with
        for group in self._optimizer.param_groups:
            group |= {"betas": config.betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}

    def close(self) -> None:
        self._sender.close()
        with contextlib.suppress(ValueError):  # no group: setup never ran
            dist.destroy_process_group()


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """The rate of optimiser step `step` (from 0): a linear rise, then constant, linear or cosine decay to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
