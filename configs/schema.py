"""The configuration sections that recipes share: frozen, closed, and the only home of defaults.

A recipe composes sections into its own Config, a subclass of RecipeConfig (see recipes/grpo.py). The text under each
field is its documentation: `python -m recipes.grpo --help` prints it. Nothing here imports ray, torch or vllm, so a
typo is reported in well under a second.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )


class ModelConfig(Section):
    path: str | None = None
    """Hugging Face folder or hub id of a causal language model; without it the tiny sort model is built in code."""
    revision: str | None = None
    """Revision of a hub id (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run code that comes with the model; needs a pinned `model.revision` for a hub id."""
    compute_dtype: Dtype = "float32"
    """Dtype of the trainer's forward and backward; master weights and optimiser state are always float32."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "ModelConfig":
        if self.trust_remote_code and self.revision is None:
            raise ValueError("model.trust_remote_code=true runs foreign code: pin it with model.revision=<commit>")
        return self


class DataConfig(Section):
    path: str | None = None
    """JSON Lines (.jsonl) or Parquet (.parquet) file of training prompts; without it the sort task is generated."""
    eval_path: str | None = None
    """File with held-out prompts; without it `eval.num_prompts` rows are held out from `data.path`."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages ({role, content}) for the chat template."""
    answer_column: str = "answer"
    """Column with the answer that the reward compares with; for sft, the completion to learn."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, in tokens."""
    long_prompts: Literal["error", "drop", "truncate"] = "error"
    """What to do with a longer prompt: stop before the run, leave the row out, or keep its last tokens."""
    shuffle: bool = True
    """Visit the rows of each epoch in an order drawn from `seed`."""


class TrainerConfig(Section):
    num_workers: PositiveInt = 2
    """Train workers, the size of the dp axis."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to zero over the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps over which the learning rate rises from zero."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW betas."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global L2 norm."""
    microbatch_tokens: PositiveInt = 8192
    """Padded tokens of one forward pass on one rank; a longer sequence gets a microbatch of its own."""
    row_tokens: PositiveInt = 128
    """Completions of one group share a row, and their prompt's computation, up to this many tokens."""


class RolloutConfig(Section):
    num_workers: PositiveInt = 2
    """vLLM engines."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that one engine's weights are cut over, a rollout worker each; it must divide the attention heads."""
    dtype: Dtype = "float32"
    """Dtype of the engine's weights."""
    max_tokens: PositiveInt = 12
    """Longest completion, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's logprobs are taken at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of evaluation; training samples from the full distribution, which the trainer can reproduce."""
    top_k: NonNegativeInt = 0
    """Top-k of evaluation sampling; 0 is off."""
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine decodes together."""
    kv_cache_bytes: PositiveInt | None = None
    """Memory of one rank's KV cache; without it, room for `max_num_seqs` full-length sequences, at most 4 GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of its GPU's memory that an engine may count on; lower it where workers share a GPU (CUDA only)."""
    eager: bool = True
    """Run the model as it is written; false lets vLLM compile it and capture CUDA graphs (CUDA only)."""


class TransportConfig(Section):
    type: Literal["auto", "shared_memory", "nixl", "collective", "stream", "object_store"] = "auto"
    """How weights reach the engines: memory that both map (one host, CPU), Ray Direct Transport over NIXL (across
    hosts, CUDA), broadcasts in a process group of their own (gloo, or NCCL on CUDA), two small buffers in turn (one
    host; workers that share a GPU), Ray's object store (slow and obvious); auto takes the fastest of shared_memory,
    nixl and object_store that reaches each engine."""
    verify: Literal["always", "first", "off"] = "always"
    """Compare a digest of every tensor where it was written with one where it has landed: on every refit, on an
    engine's first, or never."""


class WarmStartConfig(Section):
    """The supervised phase that gives the built-in sort model something to reinforce; unused with `model.path`."""

    steps: NonNegativeInt = 250
    """Supervised steps."""
    batch_size: PositiveInt = 128
    """Demonstrations of one supervised step."""
    learning_rate: PositiveFloat = 2e-3
    """Constant learning rate of the supervised phase."""


class AlgorithmConfig(Section):
    prompts_per_step: PositiveInt = 64
    """Prompts of one step."""
    group_size: PositiveInt = 8
    """Completions of one prompt, compared with each other."""
    num_minibatches: PositiveInt = 2
    """Optimiser steps that a step's groups are split into."""
    advantage_by_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); false is Dr. GRPO's advantage."""
    advantage_epsilon: PositiveFloat = 1e-6
    """Added to the standard deviation."""
    clip_low: Fraction = 0.2
    """The ratio's lower bound is 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """The ratio's upper bound is 1 + clip_high."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of KL(policy, reference) in the loss; above 0, a frozen copy of the first policy is kept."""
    max_staleness: NonNegativeInt = 0
    """Weight versions that a trained token may lag behind; 0, the synchronous loop, is what there is so far."""

    @model_validator(mode="after")
    def _is_possible(self) -> "AlgorithmConfig":
        if self.group_size == 1:
            raise ValueError("algorithm.group_size=1 leaves nothing to compare: every advantage is 0; use at least 2")
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"algorithm.num_minibatches={self.num_minibatches} exceeds algorithm.prompts_per_step="
                f"{self.prompts_per_step}: a group is not split"
            )
        if self.max_staleness > 0:
            raise ValueError("algorithm.max_staleness above 0 is not supported yet; set it to 0")
        return self


class EnvironmentConfig(Section):
    num_workers: PositiveInt = 1
    """Environment workers (CPU) that score completions."""
    timeout_s: PositiveFloat = 5.0
    """Longest time for one reward; a sample that takes longer is invalid."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 5
    """Evaluate before the first step, after every so many and at the end; 0 evaluates at the end alone."""
    num_prompts: PositiveInt = 256
    """Held-out prompts of one evaluation, one sampled completion each."""


class CheckpointConfig(Section):
    every: NonNegativeInt = 20
    """Save after every so many steps and at the end; 0 saves only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept; older ones are removed."""


class LoggingConfig(Section):
    wandb_project: str | None = None
    """Weights & Biases project; needs `pip install wandb` and its login."""
    trackio_project: str | None = None
    """Trackio project; needs `pip install trackio`."""


class DeadlineConfig(Section):
    launch_s: PositiveFloat = 300.0
    """Longest start of a worker group, model loading included."""
    rollout_s: PositiveFloat = 600.0
    """Longest wait for a step's completions."""
    train_s: PositiveFloat = 600.0
    """Longest wait for one forward_backward or optim_step."""
    refit_s: PositiveFloat = 60.0
    """Longest wait for one phase of a refit."""
    checkpoint_s: PositiveFloat = 600.0
    """Longest save or load of a checkpoint."""

    def longest_step_s(self) -> float:
        """How long a run that was asked to stop may take to finish its step and save."""
        return self.rollout_s + self.train_s + self.refit_s + self.checkpoint_s


class ClusterConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers run; auto takes CUDA when the cluster has GPUs."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GPUs of one train, rollout or reference worker; 0.5 lets a train and a rollout worker share one."""


class RecipeConfig(Section):
    """What every recipe has; a recipe adds its own sections."""

    run_name: str = ""
    """Folder under `output_dir`; the same name resumes the run. Empty: recipe and time of the start."""
    output_dir: str = "runs"
    """Where run folders are kept; shared storage when the cluster has several nodes."""
    seed: NonNegativeInt = 0
    """Seed of data order, initial weights and sampling."""
    steps: PositiveInt = 60
    """Steps of the run."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deadline: DeadlineConfig = DeadlineConfig()
    cluster: ClusterConfig = ClusterConfig()

    def num_model_workers(self) -> int:
        """Workers that hold a model, and a GPU or a share of one if the cluster has enough."""
        return self.trainer.num_workers

    def num_workers(self) -> int:
        """All worker actors of the run."""
        return self.num_model_workers()

    @field_validator("run_name")
    @classmethod
    def _run_name_is_a_folder_name(cls, value: str) -> str:
        if value and (not NAME_PATTERN.fullmatch(value) or value.strip(".") == ""):
            raise ValueError("becomes a folder: use letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="after")
    def _data_and_model_come_together(self) -> "RecipeConfig":
        if self.model.path is not None and self.data.path is None:
            raise ValueError(
                "model.path is set but data.path is not: the built-in sort task has its own model; set data.path"
            )
        if self.data.path is not None and self.model.path is None:
            raise ValueError(
                "data.path is set but model.path is not: the built-in model knows only digits; set model.path"
            )
        if self.data.eval_path is not None and self.data.path is None:
            raise ValueError("data.eval_path is set but data.path is not: set data.path")
        return self
