"""Imports run one way: no circle, no arrow up, wherever in a file the import stands.

`python -m pytest tests/test_imports.py` shows it. A new module of ``dpzoo/`` needs a place in `LAYERS`.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "versions"),
    ("example_batch", "factors", "files", "modes", "opacus_internals"),
    ("shapes",),
    ("accounting", "layers", "ledger", "losses", "poisson"),
    ("clipping", "grad_samplers", "transfer"),
    ("heads", "models"),
    ("registry",),
    ("catalogue", "conversion", "pretrained"),
    ("checkpoints", "families"),
    ("auditing", "bench", "integrations", "parity"),
    ("empirical",),
    ("training",),
    ("",),  # dpzoo/__init__.py
    ("cli",),
)
"""Modules and packages, the lowest first. One imports from lower layers, and from its own package."""


def sources() -> dict[str, str]:
    """Module -> its text."""
    found = {}
    for path in sorted((ROOT / "dpzoo").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imports(text: str, modules: Mapping[str, object]) -> Iterator[str]:
    """The modules that a text imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package has no relative imports"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield from [n for n in (submodule, node.module or "") if n in modules][:1]


def graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {module: set(imports(text, texts)) for module, text in texts.items()}


def layer(module: str) -> int:
    name = module.partition(".")[2].partition(".")[0]
    return next(number for number, names in enumerate(LAYERS) if name in names)


def arrows_up(arrows: Mapping[str, set[str]]) -> list[str]:
    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    return [
        f"{source} -> {target}"
        for source, targets in arrows.items()
        for target in sorted(targets)
        if package(source) != package(target) and layer(source) <= layer(target)
    ]


def test_each_module_has_one_layer() -> None:
    names = {module.partition(".")[2].partition(".")[0] for module in sources()}
    assert sorted(name for names_ in LAYERS for name in names_) == sorted(names)


def test_no_arrow_runs_up() -> None:
    assert arrows_up(graph(sources())) == []


def test_there_is_no_circle() -> None:
    list(TopologicalSorter(graph(sources())).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize(
    "text",
    [
        "from dpzoo.registry import FAMILIES",
        "import dpzoo.registry",
        "def f():\n    from dpzoo.registry import FAMILIES",
        "if TYPE_CHECKING:\n    from dpzoo import registry",
    ],
)
def test_a_wrong_import_is_found(text: str) -> None:
    texts = {**sources(), "dpzoo.layers.attention": text}
    assert arrows_up(graph(texts)) == ["dpzoo.layers.attention -> dpzoo.registry"]
    texts["dpzoo.registry"] = "import dpzoo.layers.attention"
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(texts)).static_order())


def test_the_way_through_the_code_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    way = text[text.index("## The way through the code") : text.index("## Versions")]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", way)
    assert len(named) > 20
    places = [ROOT, ROOT / "dpzoo", ROOT / "dpzoo" / "clipping"]
    assert [name for name in named if not any((at / name).is_file() for at in places)] == []
