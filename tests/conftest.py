import gc
import warnings
import zlib
from collections import Counter

import pytest

# torch is imported below where it is needed: the process that only starts the workers does without, seconds earlier.

gc.set_threshold(50_000, 20, 50)
"""Tracing makes and drops small objects without end: at Python's 700, collections take a tenth of the tests' time."""


MOST_CASES, ONE_IN = 3, 10
"""A test with more cases than this runs one in so many of them, unless it needs a GPU or --all-cases is given."""


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="run every case of the tests that have many")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """A sample of large grids of cases; slow tests first, so that no worker is left alone with one at the end."""
    families = Counter(item.nodeid.partition("[")[0] for item in items)

    def runs(item):
        few = families[item.nodeid.partition("[")[0]] <= MOST_CASES
        return few or item.get_closest_marker("gpu") or zlib.crc32(item.nodeid.encode()) % ONE_IN == 0

    chosen_by_name = len(items) < 2 * MOST_CASES
    if not (config.getoption("--all-cases") or chosen_by_name):
        config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
        items[:] = [item for item in items if runs(item)]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """One thread for each worker; and everything imported so far is left out of garbage collections from here on.

    torch, transformers and the tests make most of a million objects that live as long as the process, and whoever
    collects (accelerate after every training, torch where compilers are reset) would go through all of them.
    """
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Extensions complain of what is never freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache=True.*")
        yield


@pytest.fixture
def gloo():
    """A process group of this process alone."""
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
