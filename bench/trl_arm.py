"""TRL's GRPOTrainer on the work that Rayfit's GRPO recipe does, timed per GRPO step: one arm of loop_vs_trl.

Run by the interpreter of .venv-trl (`make bench-setup`), never by Rayfit's own; it imports nothing of Rayfit. A GRPO
step is `prompts * group` completions, their rewards and `minibatches` optimiser steps, each completion trained once.
The settings are the fastest that we found for TRL on this work: transformers' generate (its continuous batching takes
over twice as long in fp32 on a CPU), eager attention, a minibatch per forward, fused AdamW, nothing logged or saved;
torch.compile gains nothing. TRL's forward for the old logprobs stays: its second minibatch needs them.

Writes one JSON object; a list has an entry per GRPO step, warm-up included, and the CPU time is a mean without it:
    {"seconds_per_step": [0.91, ...], "tokens_per_step": [3841, ...], "reward_per_step": [0.31, ...],
     "cpu_seconds_per_step": 0.93, "accuracy": 0.91, "threads": 1}
"""

import argparse
import itertools
import json
import os
import pathlib
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of the starting policy")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="training rows, JSON Lines {prompt, answer}")
    parser.add_argument("--eval", type=pathlib.Path, required=True, help="held-out rows, the same")
    parser.add_argument("--steps", type=int, default=20, help="GRPO steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=4, help="first GRPO steps, left out of the CPU time")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of one GRPO step")
    parser.add_argument("--group", type=int, default=8, help="completions of one prompt")
    parser.add_argument("--minibatches", type=int, default=2, help="optimiser steps of one GRPO step")
    parser.add_argument("--max-tokens", type=int, default=12, help="longest completion")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the JSON result")
    arguments = parser.parse_args()
    if arguments.warmup >= arguments.steps:
        parser.error(f"--steps {arguments.steps} leaves nothing to measure after --warmup {arguments.warmup}")
    return arguments


def grpo_config(arguments: argparse.Namespace, output_dir: str) -> GRPOConfig:
    """The work, then what makes TRL fast at it."""
    num_completions = arguments.prompts * arguments.group
    return GRPOConfig(
        output_dir=output_dir,
        seed=arguments.seed,
        max_steps=arguments.steps * arguments.minibatches,
        num_generations=arguments.group,
        generation_batch_size=num_completions,
        max_completion_length=arguments.max_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        epsilon_high=0.28,
        scale_rewards="group",
        loss_type="bnpo",  # token mean over the minibatch; "dapo" divides by the mean token count of the minibatches
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=num_completions // arguments.minibatches,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class ExactMatch:
    """The reward, 1.0 for the answer followed by EOS and 0.0 otherwise; counts what it sees, a GRPO step per call."""

    __name__ = "exact_match"

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens_per_step: list[int] = []
        self.reward_per_step: list[float] = []

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        rewards = [
            float(text == right and ids[-1] == self.eos_token_id)
            for text, ids, right in zip(completions, completion_ids, answer, strict=True)
        ]
        self.tokens_per_step.append(sum(map(len, completion_ids)))
        self.reward_per_step.append(sum(rewards) / len(rewards))
        return rewards


class Stopwatch(TrainerCallback):
    """Times of each GRPO step, from the end of the optimiser step before it to the end of its own last."""

    def __init__(self, minibatches: int) -> None:
        self.minibatches = minibatches
        self.ends_s: list[float] = []
        self.cpu_ends_s: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.minibatches == 0:
            self._lap()

    def _lap(self) -> None:
        self.ends_s.append(time.perf_counter())
        self.cpu_ends_s.append(cpu_seconds())


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], max_tokens: int
) -> float:
    """Share of rows whose one completion, sampled at temperature 1, is the answer followed by EOS."""
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt")
    sampling = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval()
    tokens = model.generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], generation_config=sampling
    )
    completions = tokens[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    ended = (completions == tokenizer.eos_token_id).any(dim=1).tolist()
    right = [end and text == row["answer"] for end, text, row in zip(ended, texts, rows, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    reward = ExactMatch(tokenizer.eos_token_id)
    stopwatch = Stopwatch(arguments.minibatches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=arguments.model,
            args=grpo_config(arguments, folder),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(read_rows(arguments.data)),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    accuracy = sampled_accuracy(trainer.model, tokenizer, read_rows(arguments.eval), arguments.max_tokens)
    result = {
        "seconds_per_step": [end - start for start, end in itertools.pairwise(stopwatch.ends_s)],
        "tokens_per_step": reward.tokens_per_step,
        "reward_per_step": reward.reward_per_step,
        "cpu_seconds_per_step": (stopwatch.cpu_ends_s[-1] - stopwatch.cpu_ends_s[arguments.warmup])
        / (arguments.steps - arguments.warmup),
        "accuracy": accuracy,
        "threads": arguments.threads,
    }
    arguments.output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
