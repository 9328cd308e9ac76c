import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: threads would only wait


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
