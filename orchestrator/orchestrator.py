"""The orchestrator actor: launches worker groups, runs a recipe's `train(config, orchestrator)` and drives the workers.

It holds actor handles, token ids and metadata, never a tensor. Components do not know it: it wires them and calls them.
A recipe uses `launch_*` once, then per step `rollout`, `score`, `forward_backward`, `optim_step`, `refit`, `end_step`.
"""

import dataclasses
import functools
import importlib
import pathlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from configs.schema import EnvironmentConfig, RecipeConfig, RolloutConfig, TrainerConfig, TransportConfig
from orchestrator.batching import Budget, make_microbatches, split_minibatches
from orchestrator.errors import RunStopped
from orchestrator.metrics import PhaseTimes, RunLog
from orchestrator.placement import actor_options, choose_device, place
from orchestrator.run_state import RunState, finish_checkpoint, identity_of, newest_checkpoint, temporary_folder
from orchestrator.weight_sync import RefitReport, WeightSync
from orchestrator.worker_group import WorkerGroup
from transport.types import Metrics, Microbatch, Prompt, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from workers.engine import SamplingSpec
    from workers.environment import EnvironmentWorker
    from workers.rollout import RolloutWorker
    from workers.train import Loss, PolicyWorker, TrainWorker

RESTART_S = 10.0
"""Longest start of a reward process: Python and what the reward imports."""


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A Hugging Face folder or hub id; `pretrained` false draws weights from the seed instead of reading them."""

    folder: str
    pretrained: bool = True


class Orchestrator:
    """One per run, as a Ray actor. Public coroutines raise the errors of orchestrator/errors.py."""

    trainer: "WorkerGroup[TrainWorker]"
    rollouts: "WorkerGroup[RolloutWorker]"
    environments: "WorkerGroup[EnvironmentWorker]"
    reference: "WorkerGroup[PolicyWorker] | None" = None

    def __init__(self, recipe: str, config: RecipeConfig, run_dir: str) -> None:
        self.config = config
        self.run_dir = pathlib.Path(run_dir)
        self._recipe = recipe
        self.checkpoint = newest_checkpoint(self.run_dir)
        state = self.checkpoint.state if self.checkpoint else RunState(0, 0, 0, {})
        self.first_step = state.step
        # The first refit of a resumed run serves the checkpoint's version again.
        self.weight_version = max(state.weight_version - 1, 0)
        self._optim_steps = state.optim_steps
        self.log = RunLog(self.run_dir, config.logging, config.model_dump(mode="json"), self.first_step)
        self._next_step = self.first_step
        self._groups: list[WorkerGroup[Any]] = []
        self._budget = Budget(config.trainer.row_tokens, config.trainer.microbatch_tokens)
        self._times = PhaseTimes()
        self._step_started_s = time.perf_counter()
        self._stopping = False
        self._refit_report: RefitReport | None = None

    # The driver's side.

    async def run(self) -> int:
        """Run the recipe. Returns the next step to do: `config.steps`, or less after `stop`."""
        recipe = importlib.import_module(self._recipe)
        if self.checkpoint is not None:
            self.log.note(f"resuming at step {self.first_step + 1} from {self.checkpoint.folder}")
        try:
            await recipe.train(self.config, self)
        except RunStopped:
            self.log.note("stopped before the first step")
        finally:
            await self.close()
        return self._next_step

    async def messages(self, cursor: int) -> list[dict[str, Any]]:
        """What happened since message number `cursor`, for the live view."""
        return self.log.messages_since(cursor)

    async def stop(self) -> None:
        """End after the present step, with a checkpoint."""
        self._stopping = True

    def check_stop(self) -> None:
        """Raises RunStopped if `stop` was called; for loops before the first step."""
        if self._stopping:
            raise RunStopped

    # Launching.

    async def launch_trainer(self, source: PolicySource, temperature: float) -> None:
        """Start the train workers from the run's checkpoint, or else from `source`."""
        from workers.train import TrainWorker

        cluster = self.config.cluster
        num_gpus = self.config.num_model_workers() * cluster.gpus_per_worker
        self.device: Literal["cpu", "cuda"] = choose_device(cluster.device, num_gpus)
        self._gpus_per_worker = cluster.gpus_per_worker if self.device == "cuda" else 0.0
        self.log.phase(f"starting {self.config.trainer.num_workers} train workers ({self.device})")
        resumed = PolicySource(self.checkpoint.policy) if self.checkpoint else source
        self.trainer = await self._launch_policy("train", TrainWorker, resumed, temperature)

    async def launch_reference(self, source: PolicySource, temperature: float) -> None:
        """Start frozen workers of the reference policy, sharded like the trainer."""
        from workers.train import PolicyWorker

        self.log.phase("starting the reference policy")
        self.reference = await self._launch_policy("reference", PolicyWorker, source, temperature)

    async def launch_rollouts(
        self, folder: str, config: RolloutConfig, longest_prompt: int, transport: TransportConfig
    ) -> None:
        """Start the engines, without weights, and connect them to the trainer: the first refit fills them."""
        from workers.lockstep import Ranks
        from workers.rollout import RolloutWorker, make_vllm_engine

        deadline = self.config.deadline
        # Longer than a refit waits: an engine whose rank is frozen is quarantined first, and heals when it wakes.
        ranks = Ranks(config.tensor_parallel_size, deadline.launch_s, max(deadline.launch_s, 2 * deadline.refit_s))
        each = f" of {ranks.size} ranks" if ranks.size > 1 else ""
        self.log.phase(f"starting {config.num_workers} vLLM engines{each}")
        deadline_s = self.config.deadline.launch_s
        length = longest_prompt + config.max_tokens
        engine = functools.partial(
            make_vllm_engine, self.config.model, config, folder, length, self.config.seed, peer_timeout_s=ranks.step_s
        )
        placement = await place("rollout", config.num_workers * ranks.size, self._gpus_per_worker, deadline_s)
        options = actor_options(self._gpus_per_worker, max_concurrency=4, enable_tensor_transport=True)
        self.rollouts = self.launch("rollout", RolloutWorker, placement, options, (engine, ranks))
        self._ranks_per_engine = ranks.size
        if ranks.size > 1:
            firsts = range(0, len(self.rollouts), ranks.size)
            meet = await self.rollouts.scatter_some("rendezvous", dict.fromkeys(firsts, ()), deadline_s=deadline_s)
            addresses = [(meet[rank - rank % ranks.size],) for rank in range(len(self.rollouts))]
            await self.rollouts.scatter("start", addresses, deadline_s=deadline_s)
        self._weight_sync = WeightSync(
            self.trainer, self.rollouts, transport, self.config.deadline.refit_s, ranks.size, self.log.note
        )
        await self._weight_sync.connect(deadline_s)

    async def launch_environments(self, config: EnvironmentConfig, reward: str, tokenizer_folder: str) -> None:
        """Start the workers that score completions."""
        from workers.environment import EnvironmentWorker

        self._environment_config = config
        placement = await place("environment", config.num_workers, 0.0, self.config.deadline.launch_s)
        arguments = (reward, config.timeout_s, tokenizer_folder)
        options = actor_options(0.0)
        self.environments = self.launch("environment", EnvironmentWorker, placement, options, arguments)
        await self.environments.call("describe", deadline_s=self.config.deadline.launch_s)

    async def configure_optimizer(self, config: TrainerConfig, total_optim_steps: int) -> None:
        """A fresh optimiser, or the checkpoint's."""
        deadline_s = self.config.deadline.checkpoint_s
        await self.trainer.call("configure_optimizer", config, total_optim_steps, deadline_s=deadline_s)
        self._optim_steps = 0
        if self.checkpoint is not None:
            self._optim_steps = self.checkpoint.state.optim_steps
            folder = str(self.checkpoint.folder)
            await self.trainer.call("load_optimizer", folder, self._optim_steps, deadline_s=deadline_s)

    # Steps.

    async def steps(self) -> AsyncIterator[int]:
        """The steps still to do, until the last or `stop`; each is timed from here to the next one."""
        for step in range(self.first_step, self.config.steps):
            if self._stopping:
                self.log.note(f"stopping before step {step + 1}")
                return
            self.log.step = step + 1
            self._times, self._step_started_s = PhaseTimes(), time.perf_counter()
            yield step

    async def rollout(
        self, prompts_P: Sequence[Prompt], sampling: "SamplingSpec", purpose: str
    ) -> list[TrajectoryGroup]:
        """Sample every prompt `sampling.n` times: one call per engine rank for all of them, on engines that serve.

        What is sampled is a function of the run's seed, the step, `purpose` and the engine, given its weights.
        """
        from workers.rollout import Request

        engines, deadline_s = self._weight_sync.life.serving(), self.config.deadline.rollout_s
        assert engines, "no engine serves any weights: refit first"
        requests = [Request(str(index), prompt.tokens, sampling) for index, prompt in enumerate(prompts_P)]
        arguments = {
            engine * self._ranks_per_engine + rank: (
                requests[turn :: len(engines)],
                derive_seed(self.config.seed, self.log.step, purpose, engine),
                deadline_s,
                rank == 0,
            )
            for turn, engine in enumerate(engines)
            for rank in range(self._ranks_per_engine)
        }
        with self._times("rollout"):
            answers = await self.rollouts.scatter_some("generate", arguments, deadline_s=deadline_s)
        completions = {int(request_id): group for answer in answers.values() for request_id, group in answer}
        return [
            TrajectoryGroup(prompt, [Trajectory(completion) for completion in completions[index]])
            for index, prompt in enumerate(prompts_P)
        ]

    async def score(self, groups: Sequence[TrajectoryGroup]) -> dict[str, int]:
        """Give every trajectory its reward or the reason why it has none. Returns the count of each reason."""
        pairs = [(group.prompt, trajectory) for group in groups for trajectory in group.trajectories]
        samples = [
            {
                "prompt": prompt.text,
                "completion": "",
                "answer": prompt.answer,
                "finish_reason": trajectory.completion.finish_reason,
                "tokens": trajectory.completion.tokens,
            }
            for prompt, trajectory in pairs
        ]
        size = len(self.environments)
        # In the worst case every sample takes its whole time and costs its worker a new reward process.
        worst_s = (self._environment_config.timeout_s + RESTART_S) * (1 + len(samples) // size)
        with self._times("score"):
            answers = await self.environments.scatter(
                "score", [(samples[rank::size],) for rank in range(size)], deadline_s=worst_s
            )
        reasons: dict[str, int] = {}
        for rank, answer in enumerate(answers):
            for (_, trajectory), scored in zip(pairs[rank::size], answer, strict=True):
                trajectory.reward, trajectory.invalid = scored["reward"], scored["invalid"]
                if trajectory.invalid is not None:
                    kind = trajectory.invalid.partition(":")[0]
                    reasons[kind] = reasons.get(kind, 0) + 1
                    if reasons[kind] == 1:
                        self.log.note(f"reward invalid, sample masked: {trajectory.invalid}")
        return reasons

    def minibatches(self, groups: Sequence[TrajectoryGroup], num: int) -> list[list[TrajectoryGroup]]:
        """Consecutive groups, as even in number as possible."""
        return split_minibatches(groups, num)

    async def forward_backward(self, groups: Sequence[TrajectoryGroup], loss: "Loss") -> Metrics:
        """Accumulate the gradient of one minibatch, each dp rank its own part, balanced by tokens."""
        per_rank = make_microbatches(groups, len(self.trainer), self._budget)
        metrics = Metrics()
        with self._times("train"):
            if self.reference is not None:
                await self._add_reference_logprobs(self.reference, per_rank)
            arguments = [(microbatches, loss) for microbatches in per_rank]
            for part in await self.trainer.scatter(
                "forward_backward", arguments, deadline_s=self.config.deadline.train_s
            ):
                metrics.merge(part)
        return metrics

    async def optim_step(self) -> Metrics:
        """Apply the accumulated gradient on every rank."""
        metrics = Metrics()
        with self._times("train"):
            for part in await self.trainer.call("optim_step", deadline_s=self.config.deadline.train_s):
                metrics.merge(part)
        self._optim_steps += 1
        return metrics

    async def refit(self) -> RefitReport:
        """Bring the trainer's present weights to every engine, as the next weight version."""
        with self._times("refit"):
            report = await self._weight_sync.refit(self.weight_version + 1)
        self.weight_version = report.version
        self._refit_report = report
        self.log.refit(dataclasses.asdict(report))
        for engine, reason in report.quarantined.items():
            self.log.note(f"engine {engine} serves nothing until the next refit: {reason}")
        return report

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step's metrics, with its times and the refit's."""
        times = self._times.seconds
        spent = time.perf_counter() - self._step_started_s - times["evaluate"]
        timed = {
            "time/step_s": spent,
            "time/rollout_wait_s": times["rollout"],
            "time/score_s": times["score"],
            "time/train_s": times["train"],
            "time/evaluate_s": times["evaluate"],
            "cpu/step_s": self.log.take_cpu_s(),
        }
        if "tokens/step" in metrics:
            timed["tokens/s"] = metrics["tokens/step"] / spent
        refit = self._refit_report.metrics() if self._refit_report else {}
        self._next_step = step + 1
        self.log.metrics({"step": step + 1} | metrics | timed | refit, self.config.steps)

    def timed(self, phase: str) -> PhaseTimes:
        """Count what happens inside `with orchestrator.timed(phase):` as that phase of the step."""
        return self._times(phase)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after this one."""
        return step + 1 == self.config.steps or (every > 0 and (step + 1) % every == 0)

    async def maybe_save(self, step: int, tokenizer_folder: str) -> None:
        """Save a checkpoint if one is due after this step, or if the run is about to stop."""
        if not (self.is_due(step, self.config.checkpoint.every) or self._stopping):
            return
        temporary = temporary_folder(self.run_dir, step + 1)
        deadline_s = self.config.deadline.checkpoint_s
        await self.trainer.call("save", str(temporary), tokenizer_folder, deadline_s=deadline_s)
        identity = identity_of(self._recipe, self.config)
        state = RunState(step + 1, self._optim_steps, self.weight_version, identity)
        finish_checkpoint(self.run_dir, temporary, state, self.config.checkpoint.keep)

    async def save_policy(self, folder: pathlib.Path, tokenizer_folder: str) -> None:
        """Write the trainer's present policy to `folder`/policy as a Hugging Face folder."""
        deadline_s = self.config.deadline.checkpoint_s
        await self.trainer.call("save_policy", str(folder), tokenizer_folder, deadline_s=deadline_s)

    # Internals.

    async def _launch_policy(
        self, role: str, worker: Any, source: PolicySource, temperature: float
    ) -> WorkerGroup[Any]:
        from workers.train import PolicySpec

        config, deadline_s = self.config, self.config.deadline.launch_s
        spec = PolicySpec(
            config.model,
            source.folder,
            source.pretrained,
            config.seed,
            temperature,
            self.device,
            config.deadline.train_s,
        )
        placement = await place(role, config.trainer.num_workers, self._gpus_per_worker, deadline_s)
        options = actor_options(self._gpus_per_worker, enable_tensor_transport=True)
        group = self.launch(role, worker, placement, options, (spec,))
        address = await group.call_rank(0, "rendezvous", deadline_s=deadline_s)
        await group.call("setup", address, deadline_s=deadline_s)
        return group

    def launch(
        self, role: str, worker: Any, placement: Any, options: dict[str, Any], arguments: Any
    ) -> WorkerGroup[Any]:
        group: WorkerGroup[Any] = WorkerGroup.launch(role, worker, placement, options, arguments, self.log.observe)
        self._groups.append(group)
        return group

    async def _add_reference_logprobs(self, reference: WorkerGroup[Any], per_rank: list[list[Microbatch]]) -> None:
        arguments = [(microbatches,) for microbatches in per_rank]
        answers = await reference.scatter("logprobs", arguments, deadline_s=self.config.deadline.train_s)
        for microbatches, logprobs in zip(per_rank, answers, strict=True):
            for microbatch, logprobs_N in zip(microbatches, logprobs, strict=True):
                microbatch.reference_logprobs_N = logprobs_N

    async def close(self) -> None:
        """End every worker; a run that failed must not wait for workers that may be stuck."""
        for group in self._groups:
            group.kill()
        self.log.close()


def derive_seed(*parts: object) -> int:
    """A 31-bit seed that is a stable function of the parts."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) % 2**31
