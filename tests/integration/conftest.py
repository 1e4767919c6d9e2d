"""A Ray cluster per module that asks for one, started as the driver starts it, and tiny models made in code."""

import pathlib
from collections.abc import Iterator

import pytest
import ray

from orchestrator.driver import start_ray
from recipes import sort_task

FAMILIES = ("qwen3_tied", "qwen3_untied", "qwen3_moe", "llama")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_workers=16)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A saved model with random weights and the sort task's tokenizer, of each family."""
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def write_model(folder: pathlib.Path, family: str) -> pathlib.Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
        "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    config = {
        "qwen3_tied": lambda: Qwen3Config(**sizes, tie_word_embeddings=True),
        "qwen3_untied": lambda: Qwen3Config(**sizes, tie_word_embeddings=False),
        "qwen3_moe": lambda: Qwen3MoeConfig(**sizes, **moe, tie_word_embeddings=False),
        "llama": lambda: LlamaConfig(**sizes, tie_word_embeddings=False),
    }[family]()
    sort_task.write_model_folder(folder)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, so that a misplaced weight shows
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return folder
