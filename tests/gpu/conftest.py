"""A test that starts processes of its own finds the GPU as empty as the others left it."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _give_back_memory() -> Iterator[None]:
    """What torch keeps of this process's memory would be somebody else's to the next run."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
