"""What holds for every test of DPTrainer: transformers keeps quiet, and runs begin quickly."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_runs(quiet: None) -> None:
    """Trainer prints its logs, and transformers what it thinks of tiny configs."""


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> Iterator[None]:
    """Trainer collects garbage as a run begins: a fifth of a second, for the modules in memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
