"""The record of a verification, as Markdown."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from dpzoo.catalogue import quirks

PACKAGES = ("dpzoo", "transformers", "torch", "safetensors", "opacus")

HEAD = """\
# Verified checkpoints

Written by `python -m conversion.verify` on {date}, with {versions},
Python {python} ({system}).

For each checkpoint, transformers and dpzoo loaded it, dpzoo wrote it, and transformers alone read it back.
"equal" says that parameters are equal bit by bit and config fields one by one. The figures are the largest
relative differences between the stock model and dpzoo's on one padded batch of random tokens, in float64
(float32 beyond 400 million parameters): of outputs, hidden states included, and of the gradient of every
row's loss, the row alone in the stock model and in its batch in dpzoo's. transformers takes the loss of a
causal language model in float32, which shows in its gradients.

## Checkpoints of the catalogue

{reached} of {all} were reached.
"""

SYNTHETIC = """\
## Synthetic checkpoints

Small checkpoints with random weights and the key layouts of real ones, one or more for every quirk of the
catalogue. Here the values are known: those that were written equal those that were put into the file.
"""


def render(checkpoints: Sequence[Any], synthetic: Sequence[Any]) -> str:
    """The record.

    Args:
        checkpoints: results for entries of the catalogue, reached or not.
        synthetic: results for synthetic ones.
    """
    reached = [one for one in checkpoints if one.where]
    away = [one for one in checkpoints if not one.where]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    parts = [
        HEAD.format(
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            versions=versions,
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}",
            reached=len(reached),
            all=len(checkpoints),
        )
    ]
    if reached:
        parts.append(_table("checkpoint", reached, where=True))
    if away:
        parts.append(_away(away))
    if synthetic:
        parts += [
            SYNTHETIC,
            _table("quirk: class in the file, class loaded", synthetic, where=False),
        ]
        parts.append("\n".join(f"- `{name}`: {text}" for name, text in quirks().items()) + "\n")
    return "\n".join(parts)


def _table(first: str, results: Sequence[Any], where: bool) -> str:
    header = [first, *(["from"] if where else []), "class", "parameters", "stored"]
    header += ["outputs", "gradients", "result"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for one in results:
        cells = [one.name, *([one.where] if where else []), *_figures(one.parity), _result(one)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _figures(parity: Any) -> list[str]:
    if parity is None:
        return ["", "", "", "", ""]
    errors = {check.name.split(",")[0]: check.error for check in parity.checks}
    return [
        f"`{parity.model}`",
        f"{parity.parameters:,}",
        parity.stored,
        f"{errors['outputs']:.1e}",
        f"{errors['gradients of every row']:.1e}",
    ]


def _result(one: Any) -> str:
    if not one.failed:
        return "equal"
    bad = [check.name for check in one.parity.checks if not check.ok] if one.parity else []
    return "FAILED: " + "; ".join([*bad, *([one.problem] if one.problem else [])])


def _away(results: Sequence[Any]) -> str:
    by_reason: dict[str, list[str]] = {}
    for one in results:
        by_reason.setdefault(one.problem, []).append(one.name)
    lines = ["Nothing was verified for these:\n"]
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
    return "\n".join(lines) + "\n"
