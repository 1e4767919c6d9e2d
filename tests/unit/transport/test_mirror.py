import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from transport.mirror import Mirror


@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([1, 7, 16, 64, 1000]))
def test_digests_do_not_depend_on_how_tensors_fall_into_buffers(sizes: list[int], buffer_bytes: int):
    tensors = [torch.arange(size, dtype=torch.float32) + 3 * index for index, size in enumerate(sizes)]
    found = Mirror(buffer_bytes, pinned=False).digests(tensors)
    assert found == [xxhash.xxh3_128_digest(tensor.numpy().data) for tensor in tensors]


def test_a_strided_tensor_is_digested_in_the_order_of_its_elements():
    matrix = torch.arange(12, dtype=torch.int32).view(3, 4)
    digest = xxhash.xxh3_128_digest(matrix[:, 1:3].contiguous().numpy().data)
    assert Mirror(8, pinned=False).digests([matrix[:, 1:3]]) == [digest]
