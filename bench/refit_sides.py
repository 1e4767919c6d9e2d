"""What the two processes of the refit benches hold: the trainer's fp32 shards, the engine's live bf16 parameters.

The weights are random, in the 310 tensors of Qwen3-0.6B; on a CPU, or on the process's own GPU.
"""

import ctypes
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from bench.refit_memory import CPU, ENGINE_DTYPE, private_buffer
from transport.base import Landing
from transport.packing import FusedCopy
from transport.team import set_team_size

RANDOM_ELEMENTS = 16_777_213  # a prime, so that no two tensors begin at the same place of the random block
VERSION_STRIDE = 1_000_003
DIGEST_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One of the trainer's tensors, and its place in the engine: the rows of `parameter` from `row` on.

    Part("model.layers.0.self_attn.k_proj.weight", (1024, 1024), "model.layers.0.self_attn.qkv_proj.weight", 2048)
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    row: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def qwen3_parts(scale: float) -> list[Part]:
    """The 310 tensors of Qwen3-0.6B, embeddings tied; `scale` is that of the hidden size, and so of the bytes."""
    hidden = max(16, round(1024 * scale / 16) * 16)
    intermediate, vocabulary, head, queries, keys = 3072, 151936, 128, 16 * 128, 8 * 128

    def whole(name: str, *shape: int) -> Part:
        return Part(name, shape, name, 0)

    parts = [whole("model.embed_tokens.weight", vocabulary, hidden)]
    for layer in range(28):
        prefix = f"model.layers.{layer}"
        qkv, gate_up = f"{prefix}.self_attn.qkv_proj.weight", f"{prefix}.mlp.gate_up_proj.weight"
        parts += [
            whole(f"{prefix}.input_layernorm.weight", hidden),
            Part(f"{prefix}.self_attn.q_proj.weight", (queries, hidden), qkv, 0),
            Part(f"{prefix}.self_attn.k_proj.weight", (keys, hidden), qkv, queries),
            Part(f"{prefix}.self_attn.v_proj.weight", (keys, hidden), qkv, queries + keys),
            whole(f"{prefix}.self_attn.q_norm.weight", head),
            whole(f"{prefix}.self_attn.k_norm.weight", head),
            whole(f"{prefix}.self_attn.o_proj.weight", hidden, queries),
            whole(f"{prefix}.post_attention_layernorm.weight", hidden),
            Part(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden), gate_up, 0),
            Part(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden), gate_up, intermediate),
            whole(f"{prefix}.mlp.down_proj.weight", hidden, intermediate),
        ]
    return [*parts, whole("model.norm.weight", hidden)]


class TrainerSide:
    """What the trainer's halves share: the fp32 `shards`, and their places in the bf16 buffer `flat` (uint8).

    Shards and `packed` have the parts' shapes and order. `flat` keeps nothing from one refit to the next. An arm may
    leave in `leftovers` what it need not free under the clock.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device = CPU) -> None:
        self.parts = parts
        sizes = [part.size for part in parts]
        self.flat_shards = private_buffer(sum(sizes) * torch.float32.itemsize, device).view(torch.float32)
        self.flat = private_buffer(sum(sizes) * ENGINE_DTYPE.itemsize, device)
        self.shards = [t.view(part.shape) for t, part in zip(self.flat_shards.split(sizes), parts, strict=True)]
        packed = self.flat.view(ENGINE_DTYPE).split(sizes)
        self.packed = [t.view(part.shape) for t, part in zip(packed, parts, strict=True)]
        set_team_size(num_processes=1)
        self._cast = FusedCopy(list(zip(self.packed, self.shards, strict=True)))
        self._random = torch.randn(RANDOM_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device)
        self.leftovers: Any = None

    def pack(self) -> None:
        """Cast every shard into its place in `flat`."""
        torch._foreach_copy_(self.packed, self.shards)

    def fill(self, version: int) -> None:
        """The optimiser's stand-in: new weights in every shard, a function of the version alone."""
        start, rest = version * VERSION_STRIDE % RANDOM_ELEMENTS, self.flat_shards
        while rest.numel():
            piece = self._random[start : start + rest.numel()]
            rest[: piece.numel()].copy_(piece)
            start, rest = 0, rest[piece.numel() :]

    def digests(self) -> list[str]:
        """xxh3_128 of every shard's cast, in the parts' order."""
        digests = []
        for shard in self.shards:
            state = xxhash.xxh3_128()
            for piece in shard.view(-1).split(DIGEST_ELEMENTS):
                state.update(piece.to(ENGINE_DTYPE).view(torch.uint8).cpu().numpy().data)
            digests.append(state.hexdigest())
        return digests

    def retire(self) -> None:
        self.leftovers = None

    def memcpy(self) -> float:
        """Seconds to copy as many bytes as a refit brings, from the first half of the shards' memory into `flat`."""
        start = time.perf_counter()
        ctypes.memmove(self.flat.data_ptr(), self.flat_shards.data_ptr(), self.flat.nbytes)
        return time.perf_counter() - start

    def floor(self) -> float:
        """Seconds to cast all shards into private memory, by as many threads as our own arms cast with."""
        start = time.perf_counter()
        self._cast.run(verify=False)
        return time.perf_counter() - start

    def floor_one_thread(self) -> float:
        """The same by one thread."""
        start = time.perf_counter()
        self.pack()
        return time.perf_counter() - start


class EngineSide:
    """What the engine's halves share: its fused live `parameters`, and `live`, the view of them that each part fills.

    An arm may turn a parameter to other memory (`parameter.data = ...`), and leave in `leftovers` what it need not free
    under the clock.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device = CPU) -> None:
        self.parts, self.device = parts, device
        num_rows = {part.parameter: part.row + part.shape[0] for part in parts}
        shapes = {part.parameter: (num_rows[part.parameter], *part.shape[1:]) for part in parts}
        sizes = [math.prod(shape) for shape in shapes.values()]
        pieces = private_buffer(sum(sizes) * ENGINE_DTYPE.itemsize, device).view(ENGINE_DTYPE).split(sizes)
        self._home = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        self.parameters = {name: torch.nn.Parameter(home, requires_grad=False) for name, home in self._home.items()}
        self.live = self._views()
        self.leftovers: Any = None
        self.landing: Landing | None = None

    def come_home(self) -> None:
        """Turn every parameter back to the engine's own memory, for the next arm."""
        for name, home in self._home.items():
            self.parameters[name].data = home

    def digests(self) -> list[str]:
        """xxh3_128 of what the live parameters hold of every part, in the parts' order."""
        raw = (view.reshape(-1).view(torch.uint8).cpu().numpy().data for view in self._views())
        return [xxhash.xxh3_128_hexdigest(data) for data in raw]

    def retire(self) -> None:
        self.leftovers = None

    def _views(self) -> list[torch.Tensor]:
        return [self.parameters[part.parameter].data.narrow(0, part.row, part.shape[0]) for part in self.parts]
