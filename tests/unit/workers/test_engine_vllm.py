"""What an engine rank says of its parameters, against what vLLM's own loaders put there: real layers, no peers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.transport.test_names import NOBODY, Shapes, Tensors, carry, held_by_one, random_tensors
from transport.names import Cut, EngineParameter
from workers import engine_vllm  # first of vllm: it sets the environment

from vllm.config import VllmConfig, set_current_vllm_config  # isort: skip
from vllm.model_executor import parameter  # isort: skip
from vllm.model_executor.layers import linear, vocab_parallel_embedding  # isort: skip
from vllm.model_executor.layers.fused_moe import config as moe_config  # isort: skip
from vllm.model_executor.layers.fused_moe import layer as moe_layer  # isort: skip
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as moe_method  # isort: skip
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend  # isort: skip
from vllm.model_executor.layers.layernorm import RMSNorm  # isort: skip

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
EXPERTS = "model.layers.1.mlp.experts."
Become = Callable[[int, int], None]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    """Makes vLLM's layers believe that they are made on a rank of so many, with a MoE kernel for any shape."""
    kernel = (UnquantizedMoeBackend.TRITON, None)
    monkeypatch.setattr(moe_method, "select_unquantized_moe_backend", lambda moe_config: kernel)

    def pretend(rank: int, num_ranks: int) -> None:
        for module in (linear, vocab_parallel_embedding, parameter, moe_config):
            for name, value in (("rank", rank), ("world_size", num_ranks)):
                monkeypatch.setattr(
                    module, f"get_tensor_model_parallel_{name}", lambda value=value: value, raising=False
                )

    return pretend


@dataclass
class Geometry:
    """A model of vLLM layers, and the trainer's tensors that fill it."""

    num_ranks: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    intermediate: int
    vocabulary: int
    num_experts: int
    expert_parallel: bool

    def shapes(self) -> Shapes:
        q, kv, h, i = self.heads * self.head, self.kv_heads * self.head, self.hidden, self.intermediate
        rows = {"q": q, "k": kv, "v": kv}
        return {
            "model.embed_tokens.weight": (self.vocabulary, h),
            "lm_head.weight": (self.vocabulary, h),
            **{ATTENTION + f"{part}_proj.weight": (num, h) for part, num in rows.items()},
            **{ATTENTION + f"{part}_proj.bias": (num,) for part, num in rows.items()},
            ATTENTION + "o_proj.weight": (h, q),
            ATTENTION + "o_proj.bias": (h,),
            MLP + "gate_proj.weight": (i, h),
            MLP + "up_proj.weight": (i, h),
            MLP + "down_proj.weight": (h, i),
            "model.layers.0.proj.weight": (i, h),
            "model.layers.0.proj.bias": (i,),
            "model.layers.0.gate.weight": (self.num_experts, h),
            "model.norm.weight": (h,),
            EXPERTS + "gate_up_proj": (self.num_experts, 2 * i, h),
            EXPERTS + "down_proj": (self.num_experts, h, i),
        }

    def layers(self) -> dict[str, nn.Module]:
        """On the rank that vLLM believes to be."""
        h, i = self.hidden, self.intermediate
        config = VllmConfig()
        config.parallel_config.enable_expert_parallel = self.expert_parallel
        with set_current_vllm_config(config):
            runner: Any = moe_layer.FusedMoEFactory(
                num_experts=self.num_experts, top_k=1, hidden_size=h, intermediate_size=i, tp_size=self.num_ranks,
                dp_size=1, pcp_size=1, params_dtype=torch.float32, prefix="experts",
            )  # fmt: skip
            return {
                "model.embed_tokens": vocab_parallel_embedding.VocabParallelEmbedding(self.vocabulary, h),
                "lm_head": vocab_parallel_embedding.ParallelLMHead(self.vocabulary, h),
                ATTENTION + "qkv_proj": linear.QKVParallelLinear(h, self.head, self.heads, self.kv_heads, bias=True),
                ATTENTION + "o_proj": linear.RowParallelLinear(self.heads * self.head, h, bias=True),
                MLP + "gate_up_proj": linear.MergedColumnParallelLinear(h, [i, i], bias=False),
                MLP + "down_proj": linear.RowParallelLinear(i, h, bias=False),
                "model.layers.0.proj": linear.ColumnParallelLinear(h, i, bias=True),
                "model.layers.0.gate": linear.ReplicatedLinear(h, self.num_experts, bias=False),
                "model.norm": RMSNorm(h),
                EXPERTS + "routed_experts": runner.routed_experts,
            }


def assembled(layers: dict[str, nn.Module]) -> nn.Module:
    """A module that has the layers under their names."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.add_module(last, layer)
    return root


def load(layers: dict[str, nn.Module], tensors: Tensors) -> None:
    """As vLLM's models do it, with the layers' own loaders."""
    given_tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
    for path, layer in layers.items():
        for kind, one in layer.named_parameters(recurse=False):
            one.data.fill_(NOBODY)
            parent, _, last = path.rpartition(".")
            if last == "qkv_proj":
                for part in "qkv":
                    one.weight_loader(one, given_tensors[f"{parent}.{part}_proj.{kind}"], part)
            elif last == "gate_up_proj":
                for index, part in enumerate(("gate", "up")):
                    one.weight_loader(one, given_tensors[f"{parent}.{part}_proj.{kind}"], index)
            elif last == "routed_experts":
                load_experts(layer, kind, one, given_tensors)
            elif hasattr(one, "weight_loader"):
                one.weight_loader(one, given_tensors[f"{path}.{kind}"])
            else:
                one.data.copy_(given_tensors[f"{path}.{kind}"])


def load_experts(layer: Any, kind: str, one: Any, tensors: dict[str, torch.Tensor]) -> None:
    gate_up, down = tensors[EXPERTS + "gate_up_proj"], tensors[EXPERTS + "down_proj"]
    for expert in range(len(gate_up)):
        gate, up = gate_up[expert].chunk(2)
        parts = {"w1": gate, "w3": up} if kind == "w13_weight" else {"w2": down[expert]}
        for shard_id, part in parts.items():
            layer.weight_loader(one, part, f"experts.{kind}", shard_id=shard_id, expert_id=expert)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    num_ranks = draw(st.sampled_from([2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if n % num_ranks == 0 or num_ranks % n == 0]))
    per_kv = max(num_ranks // kv_heads, 1)
    return Geometry(
        num_ranks, kv_heads * per_kv * draw(st.integers(1, 2)), kv_heads, draw(st.integers(1, 3)), 4,
        num_ranks * draw(st.integers(1, 4)), draw(st.integers(1, 64 * num_ranks)) if num_ranks != 3 else 192,
        draw(st.integers(num_ranks, 2 * num_ranks + 1)), draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometry=geometries())
def test_every_rank_is_filled_as_vllms_own_loaders_fill_it(become: Become, geometry: Geometry):
    tensors = {name: array.astype(np.float32) for name, array in random_tensors(geometry.shapes()).items()}
    ranks: list[dict[str, EngineParameter]] = []
    expected: list[Tensors] = []
    num_ranks = geometry.num_ranks
    for rank in range(num_ranks):
        become(rank, num_ranks)
        layers = geometry.layers()
        model = assembled(layers)
        load(layers, tensors)
        parameters = dict(model.named_parameters())
        expected.append({name: one.detach().numpy() for name, one in parameters.items()})
        ranks.append({n: engine_vllm.describe_parameter(n, one, model, num_ranks) for n, one in parameters.items()})
    refitted = carry(held_by_one(geometry.shapes()), tensors, ranks)
    for landed, loaded, described in zip(refitted, expected, ranks, strict=True):
        for name, array in landed.items():
            filled = len(array) - described[name].padding
            np.testing.assert_array_equal(array[:filled], loaded[name][:filled], err_msg=name)
            assert not (array[:filled] == NOBODY).any(), f"{name}: left unfilled"
            assert not loaded[name][filled:].any(), f"{name}: vLLM fills more"


def test_one_rank_alone_describes_plain_parameters(become: Become):
    become(0, 1)
    model = assembled(Geometry(1, 4, 2, 2, 4, 6, 100, 4, False).layers())
    for name, one in model.named_parameters():
        described = engine_vllm.describe_parameter(name, one, model, 1)
        assert described == EngineParameter(tuple(one.shape), "float32")


@pytest.fixture
def rank_1_of_2(become: Become) -> Iterator[dict[str, Any]]:
    become(1, 2)
    yield Geometry(2, 4, 1, 2, 4, 6, 100, 4, False).layers()


def refusal(layers: dict[str, Any], name: str) -> str:
    model = assembled(layers)
    return engine_vllm.describe_parameter(name, model.get_parameter(name), model, 2).refusal


def test_the_second_of_two_ranks_that_share_a_kv_head(rank_1_of_2: dict[str, Any]):
    model = assembled(rank_1_of_2)
    name = ATTENTION + "qkv_proj.weight"
    # 4 q heads and one kv head of two rows, hidden size 4: q rows 4..7, and all of k and v.
    assert engine_vllm.describe_parameter(name, model.get_parameter(name), model, 2) == EngineParameter(
        (8, 4), "float32", (Cut(0, 4, 4, 8), Cut(0, 0, 2, 2), Cut(0, 0, 2, 2))
    )


def test_quantised_weights_are_refused_over_ranks(rank_1_of_2: dict[str, Any]):
    class Fp8LinearMethod: ...

    rank_1_of_2[MLP + "down_proj"].quant_method = Fp8LinearMethod()
    assert refusal(rank_1_of_2, MLP + "down_proj.weight") == "a refit cannot cut weights of Fp8LinearMethod over ranks"


def test_a_layer_that_is_not_known_is_refused_over_ranks_and_so_is_a_subclass(rank_1_of_2: dict[str, Any]):
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.zeros(4))

    class OtherColumns(linear.ColumnParallelLinear): ...

    layers = {"model.mixer": Mixer(), MLP + "down_proj": rank_1_of_2[MLP + "down_proj"]}
    assert refusal(layers, "model.mixer.decay") == (
        "it is not known how Mixer is cut over 2 ranks; use tensor_parallel_size 1"
    )
    layers[MLP + "down_proj"].__class__ = OtherColumns
    assert "not known how OtherColumns is cut" in refusal(layers, MLP + "down_proj.weight")


def test_experts_in_a_kernels_own_layout_are_refused(rank_1_of_2: dict[str, Any]):
    experts = rank_1_of_2[EXPERTS + "routed_experts"]
    experts.quant_method.unquantized_backend = UnquantizedMoeBackend.FLASHINFER_CUTLASS
    for kind in ("w13_weight", "w2_weight"):
        assert "layout of experts for FlashInfer CUTLASS" in refusal(
            rank_1_of_2, f"{EXPERTS}routed_experts.{kind}"
        )  # fmt: skip


def test_experts_that_are_dealt_out_in_turn_are_refused(rank_1_of_2: dict[str, Any]):
    experts = rank_1_of_2[EXPERTS + "routed_experts"]
    experts._expert_map = torch.tensor([-1, 0, -1, 1])
    experts.local_num_experts = 2
    assert refusal(rank_1_of_2, EXPERTS + "routed_experts.w2_weight") == (
        "a refit needs the experts of a rank to be consecutive"
    )


def test_embeddings_added_to_the_vocabulary_are_refused(rank_1_of_2: dict[str, Any]):
    rank_1_of_2["model.embed_tokens"].num_added_embeddings = 8
    assert "added to the vocabulary" in refusal(rank_1_of_2, "model.embed_tokens.weight")


def test_a_completion_that_several_versions_sampled_has_the_oldest_and_their_spans():
    def sample(*spans: tuple[str, int, int]) -> Any:
        tokens = list(range(10, 10 + spans[-1][2]))
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in tokens]
        versions = [SimpleNamespace(version=version, start=start, end=end) for version, start, end in spans]
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length", weight_versions=versions)

    whole = engine_vllm._completion(sample(("7", 0, 3)))
    assert (whole.tokens, whole.weight_version, whole.spans) == ([10, 11, 12], 7, [])
    spanning = engine_vllm._completion(sample(("9", 0, 2), ("10", 2, 5)))
    assert (spanning.weight_version, spanning.spans) == (9, [(9, 2), (10, 3)])
