"""What a GPU that is short of memory says, in whatever words, is one error; nothing else becomes it."""

import pytest
import torch

from g4trainer.memory_errors import as_out_of_memory


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)
def test_short_memory_is_told_in_one_way(said: str) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, as_out_of_memory():
        raise RuntimeError(said)
    assert str(caught.value) == said


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, as_out_of_memory():
        raise error
    assert caught.value is error
