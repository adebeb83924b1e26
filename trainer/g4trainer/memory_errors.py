"""A GPU that is short of memory says so in many ways; here they become one."""

import contextlib
from collections.abc import Iterator

import torch

SHORT = ("out of memory", "OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
"""In what cuBLAS, Triton, NCCL, torch's compiler and the CUDA runtime say where they, and not torch's allocator, get
no memory. cuBLAS says that it is not initialized where its handle found no room."""


@contextlib.contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Within, whatever tells that the GPU's memory is short is raised as torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in SHORT):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
