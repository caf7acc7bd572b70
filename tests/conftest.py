"""Fixtures that several test modules share."""

import os

# As psd does it: read when torch is loaded. Two threads that spin are slow beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Hubs are never asked: the suite runs without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' tensors are small: a second thread costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random tensors."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _models_folder(tmp_path_factory: pytest.TempPathFactory):
    """Bundles that the suite makes on first use go to a folder of its own."""
    before = os.environ.get("PSD_MODELS")
    os.environ["PSD_MODELS"] = str(tmp_path_factory.mktemp("models"))
    yield
    if before is None:
        del os.environ["PSD_MODELS"]
    else:
        os.environ["PSD_MODELS"] = before
