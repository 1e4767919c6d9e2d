"""Engine ranks of any model, filled from any trainer, hold what slicing gives."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.test_names import LAYER, NOBODY, Shapes, Tensors, carry, random_tensors
from transport.layout import Box, Layout, Placement, Shard, share
from transport.names import Cut, EngineParameter


@dataclass
class Model:
    """Geometry of a decoder layer, its embedding and its experts, and over how many ranks engine and trainer cut it."""

    num_ranks: int
    kv_heads: int
    q_per_kv: int
    head: int
    hidden: int
    intermediate: int
    vocabulary: int
    pad_to: int
    num_experts: int
    expert_parallel: bool
    tied: bool
    train_ranks: int
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        q, kv = self.kv_heads * self.q_per_kv * self.head, self.kv_heads * self.head
        rows = {"q": q, "k": kv, "v": kv}
        attention, mlp, experts = LAYER + "self_attn.", LAYER + "mlp.", "model.layers.1.mlp.experts."
        self.shapes = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **({} if self.tied else {"lm_head.weight": (self.vocabulary, self.hidden)}),
            **{attention + f"{part}_proj.weight": (num, self.hidden) for part, num in rows.items()},
            **{attention + f"{part}_proj.bias": (num,) for part, num in rows.items()},
            attention + "o_proj.weight": (self.hidden, q),
            mlp + "gate_proj.weight": (self.intermediate, self.hidden),
            mlp + "up_proj.weight": (self.intermediate, self.hidden),
            mlp + "down_proj.weight": (self.hidden, self.intermediate),
            experts + "gate_up_proj": (self.num_experts, 2 * self.intermediate, self.hidden),
            experts + "down_proj": (self.num_experts, self.hidden, self.intermediate),
            LAYER + "input_layernorm.weight": (self.hidden,),
        }  # fmt: skip

    def engine_rank(self, rank: int) -> dict[str, EngineParameter]:
        """What a rank says that it holds."""
        n, hidden, attention, mlp = self.num_ranks, self.hidden, LAYER + "self_attn.", LAYER + "mlp."
        q = self.kv_heads * self.q_per_kv * self.head
        replicas = max(n // self.kv_heads, 1)
        own_kv = max(self.kv_heads // n, 1) * self.head
        kv_cut = Cut(0, rank // replicas * own_kv, own_kv, self.kv_heads * self.head)
        qkv = (Cut(0, rank * q // n, q // n, q), kv_cut, kv_cut)
        share = self.intermediate // n
        gate = Cut(0, rank * share, share, self.intermediate)
        padded = -(-self.vocabulary // self.pad_to) * self.pad_to // n
        first = min(rank * padded, self.vocabulary)
        real = min(first + padded, self.vocabulary) - first
        table = EngineParameter((padded, hidden), "x", (Cut(0, first, real, self.vocabulary),), padded - real)
        held, expert_cuts, slice_ = self._experts(rank)
        section = Cut(1, *slice_, self.intermediate)
        experts = "model.layers.1.mlp.experts.routed_experts."
        return {
            "model.embed_tokens.weight": table,
            "lm_head.weight": table,
            attention + "qkv_proj.weight": EngineParameter((q // n + 2 * own_kv, hidden), "x", qkv),
            attention + "qkv_proj.bias": EngineParameter((q // n + 2 * own_kv,), "x", qkv),
            attention + "o_proj.weight": EngineParameter((hidden, q // n), "x", (Cut(1, rank * q // n, q // n, q),)),
            mlp + "gate_up_proj.weight": EngineParameter((2 * share, hidden), "x", (gate, gate)),
            mlp + "down_proj.weight": EngineParameter(
                (hidden, share), "x", (Cut(1, rank * share, share, self.intermediate),)
            ),
            experts + "w13_weight": EngineParameter(
                (held, 2 * slice_[1], hidden), "x", (*expert_cuts, section, section)
            ),
            experts + "w2_weight": EngineParameter(
                (held, hidden, slice_[1]), "x", (*expert_cuts, Cut(2, *slice_, self.intermediate))
            ),
            LAYER + "input_layernorm.weight": EngineParameter((hidden,), "x"),
        }

    def _experts(self, rank: int) -> tuple[int, tuple[Cut, ...], tuple[int, int]]:
        """How many a rank holds, the cut that says which, and its (start, length) of their intermediate indices."""
        if not self.expert_parallel:
            share = self.intermediate // self.num_ranks
            return self.num_experts, (), (rank * share, share)
        bounds = [round(self.num_experts * r / self.num_ranks) for r in range(self.num_ranks + 1)]
        held = bounds[rank + 1] - bounds[rank]
        return held, (Cut(0, bounds[rank], held, self.num_experts),), (0, self.intermediate)

    def sliced(self, tensors: Tensors, rank: int) -> Tensors:
        """The same by slicing, head by head, as an engine's own loader does it."""
        n, attention, mlp = self.num_ranks, LAYER + "self_attn.", LAYER + "mlp."

        def heads(part: str, kind: str) -> np.ndarray:
            tensor = tensors[attention + f"{part}_proj.{kind}"]
            by_head = tensor.reshape(-1, self.head, *tensor.shape[1:])
            per_rank = len(by_head) / n
            first = int(rank * per_rank)
            return by_head[first : max(int((rank + 1) * per_rank), first + 1)].reshape(-1, *tensor.shape[1:])

        def even(tensor: np.ndarray, axis: int) -> np.ndarray:
            return np.split(tensor, n, axis)[rank]

        total = -(-self.vocabulary // self.pad_to) * self.pad_to
        embedding = tensors["model.embed_tokens.weight"]
        head = embedding if self.tied else tensors["lm_head.weight"]
        gate_up, down = (tensors[f"model.layers.1.mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
        if self.expert_parallel:
            bounds = [round(self.num_experts * r / n) for r in range(n + 1)]
            w13, w2 = (tensor[bounds[rank] : bounds[rank + 1]] for tensor in (gate_up, down))
        else:
            gate, up = np.split(gate_up, 2, 1)
            w13, w2 = np.concatenate([even(gate, 1), even(up, 1)], 1), even(down, 2)
        padding = np.full((total - self.vocabulary, self.hidden), NOBODY)
        return {
            "model.embed_tokens.weight": even(np.concatenate([embedding, padding]), 0),
            "lm_head.weight": even(np.concatenate([head, padding]), 0),
            attention + "qkv_proj.weight": np.concatenate([heads(part, "weight") for part in "qkv"]),
            attention + "qkv_proj.bias": np.concatenate([heads(part, "bias") for part in "qkv"]),
            attention + "o_proj.weight": even(tensors[attention + "o_proj.weight"], 1),
            mlp + "gate_up_proj.weight": np.concatenate(
                [even(tensors[mlp + f"{part}_proj.weight"], 0) for part in ("gate", "up")]
            ),
            mlp + "down_proj.weight": even(tensors[mlp + "down_proj.weight"], 1),
            "model.layers.1.mlp.experts.routed_experts.w13_weight": w13,
            "model.layers.1.mlp.experts.routed_experts.w2_weight": w2,
            LAYER + "input_layernorm.weight": tensors[LAYER + "input_layernorm.weight"],
        }

    def trainer(self) -> Layout:
        """Rows over the train ranks, uneven and perhaps none, as FSDP cuts them."""
        layout = []
        for name, shape in self.shapes.items():
            chunk = -(-shape[0] // self.train_ranks)
            pieces = []
            for rank in range(self.train_ranks):
                first = min(rank * chunk, shape[0])
                num = min(chunk, shape[0] - first)
                if num > 0:
                    box = Box((first, *[0] * (len(shape) - 1)), (num, *shape[1:]))
                    pieces.append(Shard(rank, box, (0,) * len(shape)))
            layout.append(Placement(name, shape, name, "float32", tuple(pieces)))
        return share(layout)


@st.composite
def models(draw: st.DrawFn) -> Model:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if n % num_ranks == 0 or num_ranks % n == 0]))
    per_group = num_ranks // kv_heads if num_ranks > kv_heads else 1
    return Model(
        num_ranks, kv_heads, per_group * draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5)),
        num_ranks * draw(st.integers(1, 4)), draw(st.integers(1, 40)), num_ranks * draw(st.integers(1, 8)),
        draw(st.integers(1, 5)), draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 5)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(models())
def test_every_rank_of_any_model_gets_what_slicing_gives_from_any_trainer_and_nothing_else(model: Model):
    tensors = random_tensors(model.shapes)
    ranks = [model.engine_rank(rank) for rank in range(model.num_ranks)]
    for rank, landed in enumerate(carry(model.trainer(), tensors, ranks)):
        expected = model.sliced(tensors, rank)
        assert landed.keys() == expected.keys()
        for name, array in landed.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{name} of rank {rank}")
