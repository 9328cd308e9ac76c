import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: threads would only wait


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Other libraries draw from the global generator: in any order of tests the same."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's matrices."""
    monkeypatch.setenv("INVSOLVE_CACHE", "")
