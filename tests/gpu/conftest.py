"""What needs a CUDA device: collected and imported everywhere, skipped as a whole where there is none.

A module asks for one Ray cluster: of all GPUs of this host, or of its first one alone, which the workers then share.

Not yet run.
"""

import os
import pathlib
from collections.abc import Iterator

import pytest
import ray
import torch

from orchestrator.driver import start_ray
from tests.integration.conftest import write_model

HERE = pathlib.Path(__file__).parent
NEEDS_CUDA = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is false")
FAMILIES = ("qwen3_tied", "qwen3_moe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(NEEDS_CUDA)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Every GPU of this host."""
    start_ray(num_workers=16)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_gpu_cluster() -> Iterator[None]:
    """The first GPU of this host."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", first)
        start_ray(num_workers=16)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A saved model with random weights and the sort task's tokenizer, of each family."""
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
