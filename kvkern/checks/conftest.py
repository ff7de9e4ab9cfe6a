"""What every check is given: the model under check, fresh values from a seed that a failure prints, and the order of the files."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkern.checks import options
from kvkern.checks.subject import Subject, open_subject
from kvkern.geometry import Geometry
from kvkern.publish import Document

ORDER = ("test_contract", "test_bits", "test_rounding", "test_documents")
SEED_VARIABLE = "KVKERN_SEED"

_subject: pytest.StashKey[Subject] = pytest.StashKey()
_seed: pytest.StashKey[int] = pytest.StashKey()


def pytest_addoption(parser: Any, pluginmanager: Any) -> None:
    if not pluginmanager.has_plugin(options.__name__):
        options.pytest_addoption(parser)


def pytest_configure(config: pytest.Config) -> None:
    if not __debug__:
        raise pytest.UsageError("python runs with -O, which removes what the checks assert: run it without")
    told = os.environ.get(SEED_VARIABLE)
    config.stash[_seed] = random.SystemRandom().randrange(2**32) if told is None else int(told)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels first: where these are wrong, the rest is."""
    here = Path(__file__).parent
    if all(item.path.parent == here for item in items):
        items.sort(key=lambda item: ORDER.index(item.path.stem))


def the_seed(config: pytest.Config) -> int:
    """Of this run: drawn afresh, or told by $KVKERN_SEED."""
    return config.stash[_seed]


def the_subject(config: pytest.Config) -> Subject:
    """Opened once. Raises a KvkernError for a model, device, dtype or backend that there is not."""
    if _subject not in config.stash:
        told = {name: config.getoption(f"kvkern_{name}", None) for name in options.OPTIONS}
        config.stash[_subject] = open_subject(told.pop("model"), **told, seed=the_seed(config))
    return config.stash[_subject]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this check's values."""
    drawn = the_seed(request.config)
    print(f"seed {drawn} (again: {SEED_VARIABLE}={drawn})")
    random.seed(drawn)
    torch.manual_seed(drawn)
    return drawn


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    return the_subject(request.config)


@pytest.fixture(scope="session")
def geometry(subject: Subject) -> Geometry:
    """One layer of the model's, and another beside it."""
    return replace(subject.geometry, layers=2)


@pytest.fixture(scope="session")
def device(subject: Subject) -> torch.device:
    return subject.device


@pytest.fixture(scope="session")
def backend(subject: Subject) -> str:
    return subject.backend.name


@pytest.fixture(scope="session")
def document(subject: Subject) -> Iterator[Document]:
    """Published once; every check that asks it must leave it as it was."""
    with subject.publish() as made:
        yield made
        assert made.references == 1
        made.check()
