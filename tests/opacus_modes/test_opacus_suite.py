"""Opacus' own tests of its engine, which come in its wheel, run against `dpzoo.PrivacyEngine`."""

import importlib
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import settings
from torch import nn
from torch.utils.data import TensorDataset

import dpzoo

MODULES = (
    "privacy_engine_test",
    "privacy_engine_validation_test",
    "batch_memory_manager_test",
    "gradient_accumulation_test",
    "randomness_test",
    "mixed_precision_test",
)


def _fake_data(size: int, image_size: tuple[int, ...], num_classes: int, **_: Any) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (size,), generator=generator)
    return TensorDataset(torch.randn(size, *image_size, generator=generator), labels)


def _resnet18(**_: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(10))


def _torchvision() -> dict[str, types.ModuleType]:
    """What the tests take of torchvision: random images, and a net with batch norm."""
    names = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.datasets")
    whole, models, transforms, datasets = made = [types.ModuleType(name) for name in names]
    vars(models).update(resnet18=_resnet18)
    vars(transforms).update(Compose=list, ToTensor=list, Normalize=lambda *_: None)
    vars(datasets).update(FakeData=_fake_data)
    vars(whole).update(models=models, transforms=transforms, datasets=datasets)
    return dict(zip(names, made, strict=True))


def _cases() -> Iterator[tuple[str, type]]:
    settings.register_profile("few", max_examples=1, derandomize=True)
    before = settings._current_profile  # type: ignore[attr-defined]
    settings.load_profile("few")  # which the tests take at import
    stubs = {name: stub for name, stub in _torchvision().items() if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        for name in MODULES:
            module: Any = importlib.import_module(f"opacus.tests.{name}")
            module.PrivacyEngine = dpzoo.PrivacyEngine
            for kind in vars(module).values():
                if isinstance(kind, type) and issubclass(kind, unittest.TestCase):
                    yield kind.__name__, kind
    finally:
        settings.load_profile(before)
        for name in stubs:
            del sys.modules[name]


class Shorter:
    """The same tests on fewer rows: two batches an epoch, where there were eight."""

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        if getattr(self, "DATA_SIZE", None) == 512:
            self.DATA_SIZE = 128


for _name, _kind in _cases():
    globals()[_name] = type(_name, (Shorter, _kind), {"__module__": __name__})
