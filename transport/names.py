"""Trainer names <-> engine names: how an engine's fused parameters are made of the trainer's tensors.

Both follow Hugging Face names; an engine fuses some along dimension 0 (q, k, v -> qkv_proj), nests MoE experts one
module deeper, pads the vocabulary, and may own a tied head as a tensor of its own.
"""

from collections.abc import Iterator, Mapping

from transport.layout import Box, Layout, Shard
from transport.plan import PlanError

EXPERTS = {".mlp.experts.routed_experts.w13_weight": ".mlp.experts.gate_up_proj",
           ".mlp.experts.routed_experts.w2_weight": ".mlp.experts.down_proj"}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def engine_layout(
    parameters: Mapping[str, tuple[tuple[int, ...], str]],
    packed: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int = 0,
) -> Layout:
    """The layout of an unsharded engine in the trainer's names.

    Args:
        parameters: engine parameter -> (shape, dtype).
        packed: vLLM's `packed_modules_mapping`, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        shapes: trainer tensor -> global shape.
        rank: the engine's rank.

    Raises:
        PlanError: naming the engine parameter that no trainer tensor fills.
    """
    shards = []
    for storage, (shape, _) in parameters.items():
        row = 0
        for tensor in _parts(storage, packed, shapes):
            part = shapes[tensor]
            if part[1:] != shape[1:]:
                raise PlanError(f"{storage}: shape {shape} cannot hold {tensor} of shape {part}")
            shards.append(Shard(tensor, Box((0,) * len(part), part), rank, storage, (row,) + (0,) * (len(part) - 1)))
            row += part[0]
        is_vocabulary = storage in (HEAD, EMBEDDING)
        if row != shape[0] and not (is_vocabulary and row < shape[0]):
            raise PlanError(f"{storage}: {shape[0]} rows in the engine, {row} in the trainer")
    dtypes = {storage: dtype for storage, (_, dtype) in parameters.items()}
    return Layout({shard.tensor: shapes[shard.tensor] for shard in shards}, shards, dtypes)


def _parts(storage: str, packed: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The trainer's tensors that make one engine parameter, in the order of their rows."""
    for ending, name in EXPERTS.items():
        if storage.endswith(ending) and storage.removesuffix(ending) + name in shapes:
            yield storage.removesuffix(ending) + name
            return
    if storage in shapes:
        yield storage
        return
    if storage == HEAD and EMBEDDING in shapes:
        yield EMBEDDING
        return
    module, _, kind = storage.rpartition(".")
    parent, _, fused = module.rpartition(".")
    tensors = [f"{parent}.{part}.{kind}" for part in packed.get(fused, [])]
    if not tensors or any(tensor not in shapes for tensor in tensors):
        raise PlanError(
            f"{storage}: no tensor of the trainer fills this engine parameter; a refit supports unquantised models "
            "whose engine keeps Hugging Face names, fused along dimension 0"
        )
    yield from tensors
