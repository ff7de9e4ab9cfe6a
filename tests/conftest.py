"""What every test is given: fresh values from a seed that a failure prints, one thread a worker, and the fixture make_case."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from helpers import CaseMaker
from triton_users import uses_triton

SEED_VARIABLE = "KVKERN_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=None,
        help=f"draw every test's values from this seed, as a failure prints it; {SEED_VARIABLE} does the same",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores between them; a test that runs alone, or is told, takes what it is told.
    if "OMP_NUM_THREADS" not in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    # A suite that a shell runs in the background ignores SIGINT, and so would the processes that tests send it to.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, it would be what all other workers wait for. And the marker triton, where it belongs."""
    for item in items:
        if uses_triton(item.path):
            item.add_marker("triton")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test's values: drawn afresh, printed with a failure, and given again by --seed."""
    told = request.config.getoption("--seed")
    if told is None and SEED_VARIABLE in os.environ:
        told = int(os.environ[SEED_VARIABLE])
    drawn: int = random.SystemRandom().randrange(2**32) if told is None else told
    print(f"seed {drawn} (again: --seed {drawn})")
    random.seed(drawn)
    torch.manual_seed(drawn)
    return drawn


@pytest.fixture
def backend() -> str:
    """The backend that the contract is tested on; a module that tests another overrides this."""
    return "torch"


@pytest.fixture
def make_case(seed: int) -> CaseMaker:
    """Cases of attention with hostile buffers; see helpers.CaseMaker."""
    return CaseMaker()
