"""Opacus' internals are touched in one file, and are there in the installed Opacus."""

import ast
from pathlib import Path

import opacus
import pytest

ROOT = Path(__file__).resolve().parent.parent / "dpzoo"
HERE = ROOT / "opacus_internals.py"
IN_OPACUS = (
    "BatchSplittingSampler",
    "FastGradientClipping",
    "GRAD_SAMPLERS",
    "UniformWithReplacement",
    "_adjusted_noise_multiplier",
    "_check_skip_next_step",
    "_current_grad_sample",
    "_forward_counter",
    "_is_last_step_skipped",
    "_norm_sample",
    "_per_sample_gradient_norms",
    "_step_skip_queue",
    "get_clipping_coef",
    "get_norm_sample",
    "hooks_enabled",
)
IN_TORCH = ("orig_weight",)  # torch.nn.utils._expanded_weights
INSTALLED = "".join(path.read_text() for path in Path(opacus.__file__).parent.rglob("*.py"))
PUBLIC = ("get_norm_sample",)


def names(text: str) -> set[str]:
    """Attributes and whole strings of a text: what it can ask an object for."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return found | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_touches_them(path: Path) -> None:
    used = names(path.read_text(encoding="utf-8")) & {*IN_OPACUS, *IN_TORCH}
    if path == HERE:
        assert used == {*IN_OPACUS, *IN_TORCH}, "the lists of this test are not those of the file"
    else:
        assert used <= set(PUBLIC)


@pytest.mark.parametrize("name", IN_OPACUS)
def test_the_installed_opacus_has_them(name: str) -> None:
    assert name in INSTALLED
