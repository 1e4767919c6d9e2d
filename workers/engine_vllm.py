"""vLLM's LLMEngine in this process: the only module that imports vllm.

Create and step it on one thread. Weights stay plain: on CPU vLLM would prepack them into layouts that cannot be
written in place, so its linear layers are told not to, and MoE experts keep a plain copy that each commit prepacks.

With `rollout.tensor_parallel_size` above 1 this process is one rank of the engine (vLLM's external launcher), and the
environment says which: workers/lockstep.py. The same on CUDA, one GPU per process; not run there yet.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process, where Ray sees it die
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}

import torch

if not torch.cuda.is_available():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles a helper on CPU whatever eager says: 8 s

from vllm import EngineArgs, SamplingParams
from vllm.model_executor.layers import layernorm
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from configs.schema import ModelConfig, RolloutConfig
from transport.names import Cut, EngineParameter
from transport.types import Completion
from workers.engine import SamplingSpec

KV_BLOCK_TOKENS = 16
CPU_BLOCK_TOKENS = 128


class VllmEngine:
    """An Engine (workers/engine.py) over vLLM.

    Args:
        max_model_len: longest prompt and completion together, in tokens.
        load_format: vLLM's; "dummy" loads nothing, for weights that come with the first refit.
        peer_timeout_s: longest wait for the engine's other ranks in a collective.
    """

    def __init__(
        self, model: ModelConfig, config: RolloutConfig, folder: str, max_model_len: int, seed: int, load_format: str,
        peer_timeout_s: float,
    ) -> None:  # fmt: skip
        self._num_ranks = config.tensor_parallel_size
        if current_platform.is_cpu():
            _keep_plain_weights()
        if self._num_ranks > 1:
            _meet_by_gloo()
        arguments = EngineArgs(
            model=folder,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            skip_tokenizer_init=True,
            load_format=load_format,
            dtype=config.dtype,
            enforce_eager=config.eager,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.kv_cache_bytes or default_kv_cache_bytes(folder, config, max_model_len),
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            # A shorter prompt fills no block that another request could share; looking costs a tenth of a decode step.
            enable_prefix_caching=max_model_len - config.max_tokens >= KV_BLOCK_TOKENS,
            disable_log_stats=True,
            # On CUDA vLLM would keep a batch in flight between two steps, and take MoE kernels that reorder experts.
            async_scheduling=False,
            moe_backend="auto" if current_platform.is_cpu() else "triton",
            seed=seed % 2**31,
            **(_parallel_arguments(self._num_ranks, peer_timeout_s) if self._num_ranks > 1 else {}),
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._engine.set_weight_version("0")
        self._core: Any = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        (self._model,) = self._engine.apply_model(lambda module: module)
        self._stop_token_ids = stop_token_ids(self._engine.vllm_config.model_config.hf_config, folder)
        self.packed_modules_mapping: Mapping[str, list[str]] = getattr(self._model, "packed_modules_mapping", {})
        self._experts = {name: m for name, m in self._model.named_modules() if hasattr(m, PLAIN_EXPERTS)}
        self.turns = current_platform.is_cpu()

    def add_request(self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec) -> None:
        params = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            logprobs=0,
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": prompt_token_ids}, params)

    def has_unfinished_requests(self) -> bool:
        return self._engine.has_unfinished_requests()

    def step(self) -> list[tuple[str, list[Completion]]]:
        return [
            (output.request_id, [_completion(sample) for sample in output.outputs])
            for output in self._engine.step()
            if isinstance(output, RequestOutput) and output.finished
        ]

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def parameters(self) -> dict[str, torch.Tensor]:
        parameters = {name: parameter.data for name, parameter in self._model.named_parameters()}
        for name, module in self._experts.items():
            for kind, tensor in getattr(module, PLAIN_EXPERTS).items():
                parameters[f"{name}.{kind}"] = tensor
        return parameters

    def describe_parameters(self) -> dict[str, EngineParameter]:
        return {
            name: describe_parameter(name, tensor, self._model, self._num_ranks)
            for name, tensor in self.parameters().items()
        }

    def turn(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, module in self._experts.items():
            plain = getattr(module, PLAIN_EXPERTS)
            for kind in plain:
                plain[kind] = parameters[f"{name}.{kind}"]
        for name, parameter in self._model.named_parameters():
            module, _, kind = name.rpartition(".")
            if module not in self._experts or kind not in getattr(self._experts[module], PLAIN_EXPERTS):
                parameter.data = parameters[name]

    def weights_written(self, weight_version: int) -> None:
        for module in self._experts.values():
            _prepack_experts(module)
        self._core.pause_scheduler("keep", clear_cache=True)
        self._engine.set_weight_version(str(weight_version))
        self._core.resume_scheduler()

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def default_kv_cache_bytes(folder: str, config: RolloutConfig, max_model_len: int) -> int:
    """Room for `max_num_seqs` sequences of full length and as much again, at most 4 GiB, but for one at the least."""
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(folder).get_text_config()
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = max(heads // config.tensor_parallel_size, 1)
    token_bytes = 2 * model.num_hidden_layers * heads * head_dim * getattr(torch, config.dtype).itemsize
    # vLLM counts whole blocks, and keeps one for itself.
    sequence_bytes = token_bytes * (max_model_len + 2 * CPU_BLOCK_TOKENS)
    return max(min(2 * config.max_num_seqs * sequence_bytes, 4 << 30), 2 * sequence_bytes)


def stop_token_ids(hf_config: Any, folder: str) -> list[int]:
    """Ids that end a completion, which it keeps: those of the generation config, else those of the model's."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # the folder has no generation_config.json
        ids = None
    if ids is None:
        ids = hf_config.get_text_config().eos_token_id
    if ids is None:
        raise ValueError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id")
    return [ids] if isinstance(ids, int) else list(ids)


def _completion(sample: Any) -> Completion:
    tokens = list(sample.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, tokens, strict=True)]
    spans = [(int(span.version), span.end - span.start) for span in sample.weight_versions]
    oldest = min(version for version, _ in spans)
    return Completion(tokens, logprobs, sample.finish_reason, oldest, spans if len(spans) > 1 else [])


PLAIN_EXPERTS = "plain_expert_weights"


def _keep_plain_weights() -> None:
    """Before an engine is made on CPU: linear layers use their weight as it is, experts remember it unpacked."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    prepack = CPUUnquantizedExperts.process_weights_after_loading
    if getattr(prepack, "keeps_plain", False):
        return

    def prepack_copy(self: Any, layer: torch.nn.Module) -> None:
        if not hasattr(layer, PLAIN_EXPERTS):
            plain = {name: getattr(layer, name).data for name in ("w13_weight", "w2_weight")}
            setattr(layer, PLAIN_EXPERTS, plain)
        prepack(self, layer)

    prepack_copy.keeps_plain = True  # type: ignore[attr-defined]
    vllm_layers.dispatch_cpu_unquantized_gemm = plain_linear
    CPUUnquantizedExperts.process_weights_after_loading = prepack_copy  # type: ignore[method-assign]


def _prepack_experts(module: Any) -> None:
    """Derive the kernel's expert weights from the plain ones again."""
    for name, tensor in getattr(module, PLAIN_EXPERTS).items():
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _parallel_arguments(num_ranks: int, timeout_s: float) -> dict[str, Any]:
    """vLLM's arguments for one rank of several, each a process that is launched by us and sees its own device only."""
    return {
        "tensor_parallel_size": num_ranks,
        "distributed_executor_backend": "external_launcher",
        "distributed_timeout_seconds": int(timeout_s),
        "cpu_distributed_timeout_seconds": int(timeout_s),
        "disable_custom_all_reduce": True,  # it opens the other ranks' devices, which this process does not see
    }


def _meet_by_gloo() -> None:
    """Ranks on CPU reduce by gloo, and nowhere do they broadcast objects through shared memory.

    Under the external launcher vLLM's own CPU reduction would use segments of one name for every engine of a host, and
    its ranks spin while they wait, for ever if one dies. Segments of both kinds outlive a rank that is killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    def no_shared_memory(self: Any) -> bool:
        return False

    def no_queue(*arguments: Any, **more: Any) -> None:
        return None

    CpuCommunicator._all_group_ranks_share_shm_group_name = no_shared_memory  # type: ignore[method-assign]
    MessageQueue.create_from_process_group = staticmethod(no_queue)  # type: ignore[assignment, method-assign]


def describe_parameter(name: str, tensor: torch.Tensor, model: torch.nn.Module, num_ranks: int) -> EngineParameter:
    """What a rank holds of a parameter, by the layer that it belongs to; with a refusal if that is not known."""
    plain = EngineParameter(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    path, _, kind = name.rpartition(".")
    layer = model.get_submodule(path)
    if num_ranks == 1:  # it is whole, but some kernels reorder experts even so
        reordered = CUTS.get(type(layer)) is _experts and _experts(plain, layer, kind).refusal
        return dataclasses.replace(plain, refusal=reordered or "")
    method = getattr(layer, "quant_method", None)
    if method is not None and not isinstance(method, UNQUANTIZED):
        return dataclasses.replace(plain, refusal=f"a refit cannot cut weights of {type(method).__name__} over ranks")
    cut = CUTS.get(type(layer))
    if cut is not None:
        return cut(plain, layer, kind)
    if isinstance(layer, WHOLE) or type(layer).__module__ == layernorm.__name__:
        return plain
    refusal = f"it is not known how {type(layer).__name__} is cut over {num_ranks} ranks; use tensor_parallel_size 1"
    return dataclasses.replace(plain, refusal=refusal)


def _column(plain: EngineParameter, layer: Any, kind: str) -> EngineParameter:
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    return dataclasses.replace(plain, cuts=tuple(_share(0, size, layer.tp_rank, layer.tp_size) for size in sizes))


def _qkv(plain: EngineParameter, layer: Any, kind: str) -> EngineParameter:
    """Ranks beyond the number of kv heads hold a kv head together."""
    of_kv = layer.tp_rank // layer.num_kv_head_replicas, layer.tp_size // layer.num_kv_head_replicas
    return dataclasses.replace(
        plain,
        cuts=(
            _share(0, layer.total_num_heads * layer.head_size, layer.tp_rank, layer.tp_size),
            _share(0, layer.total_num_kv_heads * layer.head_size, *of_kv),
            _share(0, layer.total_num_kv_heads * layer.v_head_size, *of_kv),
        ),
    )


def _row(plain: EngineParameter, layer: Any, kind: str) -> EngineParameter:
    if kind == "bias":
        return plain
    return dataclasses.replace(plain, cuts=(_share(1, layer.input_size, layer.tp_rank, layer.tp_size),))


def _vocabulary(plain: EngineParameter, layer: Any, kind: str) -> EngineParameter:
    """The padded vocabulary is cut; what this rank has of the real one comes first."""
    if layer.num_added_embeddings > 0:
        return dataclasses.replace(plain, refusal="a refit cannot fill embeddings that were added to the vocabulary")
    start, num = layer.shard_indices.org_vocab_start_index, layer.shard_indices.num_org_elements
    padding = layer.num_embeddings_per_partition - num
    return dataclasses.replace(plain, cuts=(Cut(0, start, num, layer.org_vocab_size),), padding=padding)


def _experts(plain: EngineParameter, layer: Any, kind: str) -> EngineParameter:
    """A range of the experts, and of each a share of its gate, up and down projection."""
    parallel, backend = layer.moe_config.moe_parallel_config, layer.quant_method.unquantized_backend
    if backend not in PLAIN_BACKENDS or layer.is_fused_checkpoint_transposed or parallel.enable_eplb:
        return dataclasses.replace(plain, refusal=f"a refit does not know the layout of experts for {backend.value}")
    where = [] if layer._expert_map is None else layer._expert_map.tolist()
    held = [index for index, at in enumerate(where) if at >= 0]
    if held and held != list(range(held[0], held[0] + layer.local_num_experts)):
        return dataclasses.replace(plain, refusal="a refit needs the experts of a rank to be consecutive")
    experts = (Cut(0, min(held, default=0), len(held), layer.global_num_experts),) if where else ()
    share = _share(1, layer.moe_config.intermediate_size, parallel.tp_rank, parallel.tp_size)
    match kind:
        case "w13_weight":
            sections = (share, share) if layer.moe_config.is_act_and_mul else (share,)
        case "w2_weight":
            sections = (dataclasses.replace(share, dimension=2),)
        case _:
            return dataclasses.replace(plain, refusal=f"a refit does not know how the experts' {kind} is cut")
    return dataclasses.replace(plain, cuts=experts + sections)


def _share(dimension: int, whole: int, rank: int, num_ranks: int) -> Cut:
    return Cut(dimension, rank * (whole // num_ranks), whole // num_ranks, whole)


UNQUANTIZED = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
PLAIN_BACKENDS = (UnquantizedMoeBackend.CPU, UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON)
"""MoE kernels that take the experts as they are trained: gate rows, then up rows."""
CUTS: dict[type, Callable[[EngineParameter, Any, str], EngineParameter]] = {
    ColumnParallelLinear: _column,
    MergedColumnParallelLinear: _column,
    QKVParallelLinear: _qkv,
    RowParallelLinear: _row,
    VocabParallelEmbedding: _vocabulary,
    ParallelLMHead: _vocabulary,
    RoutedExperts: _experts,
}
"""Layers that cut their parameters over ranks; a subclass may do it in another way, so it is not taken for its base."""
WHOLE = (ReplicatedLinear, torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.Embedding)
"""Layers that every rank holds whole; that they do, their shape shows."""
