"""Opacus' own tests of its engine, which come in its wheel, run against `dpzoo.PrivacyEngine`.

They run as they are, but for three things: `PrivacyEngine` is dpzoo's; torchvision, which is not
installed, is a stand-in with random images and a net with batch norm; and 512 rows are 128, with one
example for each of hypothesis' tests (a step with a closure, which is among the others, is refused by
dpzoo). What differs on purpose is in `DIFFERS`, with the reason, and has to differ in that way.

Left out: the convolutional net's classes and those that repeat these in functorch and ew, for their time.
"""

import importlib
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.utils.data import TensorDataset

from dpzoo import PrivacyEngine

CLASSES = {
    "privacy_engine_test": (
        "PrivacyEngineTiedWeightsTest",
        "PrivacyEngineCustomLayerTest",
        "PrivacyEngineCustomLayerHooksTest",
    ),
    "privacy_engine_validation_test": ("PrivacyEngineValidationTest",),
    "batch_memory_manager_test": (
        "BatchMemoryManagerTest",
        "BatchMemoryManagerTestWithExpandedWeights",
    ),
    "gradient_accumulation_test": ("GradientAccumulationTest",),
    "randomness_test": (
        "DataLoaderRandomnessTest",
        "DataLoaderSwitchRandomnessTest",
        "OptimizerRandomnessTest",
        "PrivacyEngineSecureModeTest",
    ),
}
SLOW = ("test_make_private_with_epsilon",)  # searches for the noise by PRV

DIFFERS = {
    # Batch norm is refused by an error of dpzoo's own class, which names the remedy, and not by Opacus'.
    "test_model_validator": "takes statistics over the rows of a batch",
    # A checkpoint is written aside and renamed, and has a ledger beside it: it needs a path.
    "test_checkpoints": "got a BytesIO, wanted the path of a file",
    # Noise has a secret key and does not follow from torch.manual_seed: two runs never have the same.
    "test_deterministic_run": "Model parameters after deterministic run must match",
    # The same: the weights of two runs with noise are compared.
    "test_equivalent_to_one_batch": "False is not true",
    # The same, of PrivacyEngineSecureModeTest; OptimizerRandomnessTest's, without the engine, passes.
    "PrivacyEngineSecureModeTest.test_global_seed": "False is not true",
    # A new pass over the loader drops what was not stepped, so that two draws do not add up.
    "test_privacy_engine_poisson_accumulation": "ValueError not raised",
}


def _fake_data(size: int, image_size: tuple[int, ...], num_classes: int, **_: Any) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (size,), generator=generator)
    return TensorDataset(torch.randn(size, *image_size, generator=generator), labels)


class _Net(nn.Module):
    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.classifier: nn.Module = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _torchvision() -> dict[str, types.ModuleType]:
    """What the tests take of torchvision."""
    names = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.datasets")
    whole, models, transforms, datasets = made = [types.ModuleType(name) for name in names]
    vars(models).update(resnet18=_Net, densenet121=_Net)
    vars(transforms).update(Compose=list, ToTensor=list, Normalize=lambda *_: None)
    vars(datasets).update(FakeData=_fake_data)
    vars(whole).update(models=models, transforms=transforms, datasets=datasets)
    return dict(zip(names, made, strict=True))


def _cases() -> Iterator[type]:
    settings.register_profile("one", max_examples=1, derandomize=True)
    before = settings._current_profile  # type: ignore[attr-defined]
    settings.load_profile("one")  # which the tests take at import
    stubs = {name: stub for name, stub in _torchvision().items() if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        for name, classes in CLASSES.items():
            module: Any = importlib.import_module(f"opacus.tests.{name}")
            module.PrivacyEngine = PrivacyEngine
            for kind in classes:
                yield getattr(module, kind)
    finally:
        settings.load_profile(before)
        for name in stubs:
            del sys.modules[name]


class _Shorter:
    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        if getattr(self, "DATA_SIZE", None) == 512 and self._testMethodName not in SLOW:  # type: ignore[attr-defined]
            self.DATA_SIZE = 128


def _differing(name: str, how: str) -> Any:
    def test(self: Any) -> None:
        with pytest.raises(Exception, match=how):
            getattr(super(type(self), self), name)()

    return test


def _same(name: str) -> Any:
    def test(self: Any) -> None:
        getattr(super(type(self), self), name)()

    return test


def _case(kind: type) -> type:
    body: dict[str, Any] = {"__module__": __name__}
    for name, how in DIFFERS.items():
        owner, _, test = name.rpartition(".")
        if hasattr(kind, test) and owner in ("", kind.__name__):
            body[test] = _differing(test, how)
    made = type(kind.__name__, (_Shorter, kind), body)
    for name in SLOW:
        if hasattr(kind, name):
            setattr(made, name, pytest.mark.slow(_same(name)))
    return made


for _kind in _cases():
    assert issubclass(_kind, unittest.TestCase)
    globals()[_kind.__name__] = _case(_kind)
del _kind
