from collections import Counter

import pytest
import torch
from cases import Backend


def pytest_configure(config):
    config.addinivalue_line("markers", "thinned(n): of its parameters the emulator, which is slow, runs every n-th")


def pytest_collection_modifyitems(items):
    """Leaves out what ``thinned`` says. An n without a common factor with the parameters' numbers meets all of them."""
    seen = Counter()

    def stays(item):
        mark = item.get_closest_marker("thinned")
        if mark is None or "emulated" not in getattr(item, "callspec", item).id.split("-"):
            return True
        seen[item.originalname] += 1
        return seen[item.originalname] % mark.args[0] == 1

    items[:] = filter(stays, items)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


def _params(*names):
    marks = {"cuda": pytest.mark.cuda}
    return [pytest.param(Backend(name), marks=marks.get(name, ()), id=name) for name in names]


@pytest.fixture(params=_params("reference", "cpu", "emulated", "cuda"))
def backend(request):
    """Who computes: the definition, the C++ library, the CUDA kernels on the CPU, or on a GPU."""
    return request.param.ready()


@pytest.fixture(params=_params("cpu", "emulated", "cuda"))
def native(request):
    """Who computes, other than the definition."""
    return request.param.ready()


@pytest.fixture(params=_params("emulated", "cuda"))
def kernels(request):
    """The CUDA kernels."""
    return request.param.ready()
