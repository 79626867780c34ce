"""The errors that docs/troubleshooting.md is sorted by are those that the libraries raise."""

import re
from functools import cache
from pathlib import Path

import opacus
import pytest
import torch

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
FOREIGN, OWN = PAGE.split("\n## dpzoo\n")
OWN = OWN.split("\n## ")[0]


def headings(text: str) -> list[str]:
    return re.findall(r"^### (.*)$", text, flags=re.MULTILINE)


def unequal() -> None:
    torch.stack([torch.zeros(2), torch.zeros(1)])


def empty() -> None:
    torch.zeros(0, 3).reshape(0, -1, 4)


def constant() -> None:
    torch.zeros(1).sum().backward()


def expanded() -> None:
    torch.zeros(1, 3).expand(2, 3).view(6)


TORCH = {
    "stack expects each tensor to be equal size": unequal,
    "cannot reshape tensor of 0 elements": empty,
    "element 0 of tensors does not require grad": constant,
    "view size is not compatible with input tensor's size and stride": expanded,
}
"""Errors of torch that are raised here."""

SEEN_ELSEWHERE = {
    "TypeError in the first batch, `dtype`": "test_a_first_batch_that_is_empty_has_no_keys",
    "CUDA out of memory": None,
}
"""Those that are not a text, and what shows them; the second needs a GPU."""


@cache
def source(folder: Path) -> str:
    """All Python below a folder, with adjacent string literals joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


@pytest.mark.parametrize("heading", TORCH)
def test_torch_says_so(heading: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(heading)):
        TORCH[heading]()


@pytest.mark.parametrize(
    "heading", [h for h in headings(FOREIGN) if h not in {**TORCH, **SEEN_ELSEWHERE}]
)
def test_opacus_or_torch_says_so(heading: str) -> None:
    folders = [Path(opacus.__file__).parent, Path(torch.__file__).parent / "nn" / "utils"]
    assert any(heading in source(folder) for folder in folders)


@pytest.mark.parametrize("heading", headings(OWN))
def test_dpzoo_says_so(heading: str) -> None:
    assert heading in source(ROOT / "dpzoo")


def test_the_error_that_brings_people_here_is_first() -> None:
    assert headings(PAGE)[0] == "stack expects each tensor to be equal size"
    assert len(headings(OWN)) > 15
    facts = (ROOT / "tests" / "opacus_modes" / "test_opacus_facts.py").read_text(encoding="utf-8")
    for name in filter(None, SEEN_ELSEWHERE.values()):
        assert f"def {name}(" in facts
