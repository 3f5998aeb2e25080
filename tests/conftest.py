"""Shared fixtures: the reference's golden vectors and real images, both beside the checkout and both optional."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from leftovers import (  # noqa: F401  # hooks
    pytest_configure,
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_unconfigure,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


class Golden:
    """One golden file: `["out.y"]` gives a cloned tensor, `.config` the settings, `.state(prefix)` a state dict."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
            # cloned: safetensors maps tensors at unaligned addresses, where matmul kernels round differently
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self.config = json.loads(self.metadata["config"])

    def __getitem__(self, name: str):
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def state(self, prefix: str = "param.") -> dict:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def golden():
    """`golden("prr_h3")` -> Golden, of the first set or the second; no name is in both."""

    def load(name: str) -> Golden:
        paths = [SHARED / folder / f"{name}.safetensors" for folder in ("golden", "golden2")]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            pytest.skip(
                f"no golden vectors: neither {paths[0]} nor {paths[1]} is there (they lie beside the checkout, not in it)"
            )
        return Golden(path)

    return load


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("cifar10")` -> Path of a folder of real shards."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"no real images: {path} is not there (they lie beside the checkout, not in it)")
        return path

    return find


@pytest.fixture(scope="session")
def vits14() -> Path:
    """A real checkpoint: a ViT-S/14 in the layout of facebookresearch/dinov2."""
    path = SHARED / "weights" / "dinov2_vits14_saliency_fp16.safetensors"
    if not path.exists():
        pytest.skip(f"no real checkpoint: {path} is not there (it lies beside the checkout, not in it)")
    return path


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Test workers run side by side on few cores; bit-exact comparisons want a fixed thread count."""
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-factor", type=int, default=1, help="cases of a fuzz campaign, as a multiple of those in the quick suite"
    )
