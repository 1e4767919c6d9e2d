"""What a checkpoint is made of: the policy as a Hugging Face folder, the optimiser's state by torch DCP.

Called on every rank. Weights are gathered one tensor at a time, and only rank 0 keeps them.
"""

import pathlib
import shutil

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json", "vocab.txt", "spiece.model",
)  # fmt: skip


def save_policy(
    model: PreTrainedModel, parameters: dict[str, DTensor], folder: str, tokenizer_folder: str, rank: int
) -> None:
    """Write `folder`/policy: config, float32 safetensors and the tokenizer; `from_pretrained` loads it."""
    weights = {}
    for name, parameter in parameters.items():
        full = parameter.full_tensor().detach()
        if rank == 0:
            weights[name] = full.cpu()
    if rank != 0:
        return
    target = pathlib.Path(folder) / "policy"
    model.save_pretrained(target, state_dict=weights)
    for file in TOKENIZER_FILES:
        source = pathlib.Path(tokenizer_folder) / file
        if source.is_file() and not (target / file).exists():
            shutil.copyfile(source, target / file)


def save_optimizer(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Write `folder`/optimizer, every rank its own shards."""
    state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    dcp.save(state, checkpoint_id=str(pathlib.Path(folder) / "optimizer"))


def load_optimizer(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Read what `save_optimizer` wrote, also on another number of ranks."""
    state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=str(pathlib.Path(folder) / "optimizer"))
    set_optimizer_state_dict(policy, optimizer, state["optimizer"])
