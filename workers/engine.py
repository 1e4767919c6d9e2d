"""What a RolloutWorker needs of an inference engine. The names are vLLM's own where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from transport.names import EngineParameter
from transport.types import Completion


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How one prompt is sampled: `n` completions of at most `max_tokens` tokens."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Engine(Protocol):
    """Continuous batching in this process: requests are added, `step` decodes one token of every running one."""

    packed_modules_mapping: Mapping[str, list[str]]
    turns: bool
    """Whether `turn` works: False where something keeps the addresses of the parameters, such as a CUDA graph."""

    def add_request(self, request_id: str, prompt_token_ids: list[int], sampling: SamplingSpec) -> None: ...

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[tuple[str, list[Completion]]]:
        """Decode one token each. Returns the requests that finished, with all n completions."""

    def seed(self, seed: int) -> None:
        """Make the sampling that follows a function of this seed and of the requests, in order."""

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Where a refit writes: plain tensors, one per weight, as they are at present."""

    def describe_parameters(self) -> dict[str, EngineParameter]:
        """What each of them holds of the model, in the same order."""

    def turn(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Serve from these tensors from now on, which may be read-only, and let go of the present ones."""

    def weights_written(self, weight_version: int) -> None:
        """The parameters hold a new version: rebuild what was derived from them, drop cached keys and values."""

    def close(self) -> None: ...
