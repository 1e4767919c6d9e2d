"""The policy: a Hugging Face causal language model that returns logprobs of chosen tokens, sharded by FSDP2.

Any model whose `forward` applies its output embedding to hidden states works: a hook hands the head only the positions
that predict something, and the model's own scaling or soft-capping of logits still applies.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.schema import ModelConfig
from transport.types import Microbatch
from workers.logprobs import token_logprobs

WRAP_LAYERS_FROM_PARAMETERS = 50_000_000


class Policy(nn.Module):
    """`forward(microbatch)` -> (logprobs_N, entropies_N) of the microbatch's targets."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self._sources_N: torch.Tensor | None = None
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._keep_sources)

    def forward(self, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        self._sources_N = batch.sources_N
        logits_NV = self.model(
            input_ids=batch.tokens_RT,
            position_ids=batch.positions_RT,
            attention_mask=attention_mask(batch.segments_RT),
            use_cache=False,
        ).logits
        return token_logprobs(logits_NV, batch.targets_N, self.temperature)

    def _keep_sources(self, head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1)[self._sources_N],)


def attention_mask(segments_RT: torch.Tensor) -> torch.Tensor:
    """Boolean mask of shape R, 1, T, T: a position sees its own segment and the prompt (segment 0), never the future.

    A padding position sees itself: a row of the mask that is all false would make NaN in softmax.
    """
    num_positions = segments_RT.shape[1]
    causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=segments_RT.device).tril()
    queries, keys = segments_RT.unsqueeze(2), segments_RT.unsqueeze(1)
    return ((queries == keys) | ((keys == 0) & (queries >= 0))).logical_and_(causal).unsqueeze(1)


def build_model(config: ModelConfig, folder: str, pretrained: bool, seed: int) -> PreTrainedModel:
    """The model on the CPU in float32: weights from the folder, or drawn from the seed, the same on every rank."""
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "attn_implementation": "sdpa"}
    if config.revision is not None:
        settings["revision"] = config.revision
    if pretrained:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    _check_attention(model)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():  # the engine samples without dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (torch types every attribute as a tensor)
    return model.train()


def shard(policy: Policy, mesh: DeviceMesh, compute_dtype: str) -> Policy:
    """Shard parameters over the mesh, dimension 0; a small model as a whole, a large one layer by layer."""
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, compute_dtype), reduce_dtype=torch.float32)
    size = sum(parameter.numel() for parameter in policy.parameters())
    if size >= WRAP_LAYERS_FROM_PARAMETERS:
        layers = set(policy.model._no_split_modules or ())
        for module in list(policy.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return policy


@torch.no_grad()
def join_shards(policy: nn.Module) -> None:
    """Move this rank's shards into one buffer, in order: a refit then casts neighbours in one go.

    Before any forward. A shard that FSDP pads (an uneven one) stays in memory of its own, and is as right as before.
    """
    shards = {id(parameter): cast(DTensor, parameter).to_local() for parameter in policy.parameters()}
    first = next(iter(shards.values()))
    flat = torch.empty(sum(shard.numel() for shard in shards.values()), dtype=first.dtype, device=first.device)
    parts = flat.split([shard.numel() for shard in shards.values()])
    views = {
        key: part.view(shard.shape).copy_(shard.detach())
        for (key, shard), part in zip(shards.items(), parts, strict=True)
    }

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):  # a buffer
            return tensor
        mesh, placements = tensor.device_mesh, tensor.placements
        return DTensor.from_local(
            views[id(tensor)], mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    policy._apply(move)


def _check_attention(model: PreTrainedModel) -> None:
    """Refuse what our attention would leave out in silence: windows, chunks and soft caps.

    Raises:
        ValueError: naming the model and the setting.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ["full_attention", "sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name}: attention of kind {sorted(kinds)} is not supported by the trainer")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if "sliding_attention" in kinds and window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{name}: sliding-window attention is not supported by the trainer; if your sequences are shorter than the "
            f"window of {window}, set sliding_window to null in the model's config.json"
        )
    for setting in ("attn_logit_softcapping", "kv_lora_rank"):  # the second: an engine keeps weights derived from it
        if getattr(config, setting, None) is not None:
            raise ValueError(f"{name}: {setting} is not supported")
