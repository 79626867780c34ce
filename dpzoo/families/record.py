"""The record of what was verified: packaged as JSON, for `dpzoo list`, and printed as docs/models.md."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpzoo.families.tiny import AUTO_CLASSES
from dpzoo.families.trial import EXACT, FLOAT32, MODES, Result
from dpzoo.files import write_text

PACKAGES = ("torch", "transformers", "opacus")

INTRODUCTION = """\
# Stock architectures, verified

`dpzoo.PrivacyEngine` trains stock transformers models as they are. This page is written by

    {command}

with {versions}, Python {python}.

Each architecture is a tiny instance of its default config, with random parameters and without dropout,
in float64. Each row of a batch is run alone through the stock model. One private step without noise, with
C at the median norm, is compared with that: each row's norm, and the clipped sum in each parameter; in
`bk` each row's gradient in each parameter, too.

- **exact**: the largest relative error is at most {exact}, or {float32} where the stock model itself
  computes in float32 (found by watching its casts; marked *).
- **refused**: an error, and nothing is learned. Those of `bk` follow the tables.
- **WRONG**: no error, and other gradients.
"""


def recorded() -> tuple[dict[str, str], list[Result]]:
    """The packaged record: package -> version, and the results."""
    text = resources.files("dpzoo.families").joinpath("verified.json").read_text("utf-8")
    data = json.loads(text)
    return data["versions"], [Result(**one) for one in data["results"]]


def write(path: Path, results: Sequence[Result]) -> None:
    """Write a record: an object with ``versions`` and ``results``, a line for each architecture."""
    lines = ",\n".join(json.dumps(_short(one), sort_keys=True) for one in results)
    versions = json.dumps({name: version(name) for name in PACKAGES})
    write_text(path, f'{{"versions": {versions},\n"results": [\n{lines}\n]}}\n')


def _short(result: Result) -> dict[str, Any]:
    """A result without its time, and with nothing that changes from run to run."""
    made = asdict(result)
    del made["seconds"]
    made["runs"] = result.runs[:160]
    made["modes"] = {mode: verdict[:160] for mode, verdict in result.modes.items()}
    made["error"] = {mode: float(f"{error:.0e}") for mode, error in result.error.items()}
    made["loss"] = None if result.loss is None else float(f"{result.loss:.0e}")
    return made


def verdict(result: Result, mode: str) -> str:
    """One word: exact, refused, WRONG, or "-" where it was not tried."""
    return result.modes.get(mode, "-").split(":")[0]


def markdown(results: Sequence[Result], command: str) -> str:
    """The page docs/models.md."""
    tried = [one for one in results if one.modes]
    parts = [
        INTRODUCTION.format(
            command=command,
            versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
            python=platform.python_version(),
            exact=f"{EXACT:.0e}",
            float32=f"{FLOAT32:.0e}",
        ),
        "| auto class | tried | "
        + " | ".join(f"`{mode}` exact, refused, wrong" for mode in MODES)
        + " |",
        "|---|---|" + "---|" * len(MODES),
    ]
    for task, (auto, _) in AUTO_CLASSES.items():
        own = [one for one in tried if one.name.startswith(f"{task}/")]
        parts.append(
            f"| {auto} | {len(own)} | " + " | ".join(_counts(own, mode) for mode in MODES) + " |"
        )
    parts.append(
        f"| all | {len(tried)} | " + " | ".join(_counts(tried, mode) for mode in MODES) + " |"
    )
    for task, (auto, _) in AUTO_CLASSES.items():
        own = [one for one in tried if one.name.startswith(f"{task}/")]
        if not own:
            continue
        parts += [
            "",
            f"## {auto}",
            "",
            "| architecture | class | hooks | ghost | bk | error in bk |",
            "|---|---|---|---|---|---|",
        ]
        for one in own:
            error = (
                f"{one.error['bk']:.0e}{'*' if one.float32 else ''}" if "bk" in one.error else ""
            )
            cells = " | ".join(_cell(verdict(one, mode)) for mode in MODES)
            parts.append(f"| {one.name.split('/')[1]} | {one.cls} | {cells} | {error} |")
    refused = [one for one in tried if verdict(one, "bk") == "refused"]
    parts += ["", "## What bk refuses, and why", ""]
    parts += [
        f"- {one.name}: {_plain(one.modes['bk'].removeprefix('refused: '))}" for one in refused
    ] or ["Nothing."]
    mixing = [one for one in tried if one.runs != "yes"]
    if mixing:
        parts += ["", "## Models whose rows depend on each other", ""]
        parts += [f"- {one.name}: {_plain(one.runs)}" for one in mixing]
    skipped = [one for one in results if not one.modes]
    parts += ["", "## Not tried", "", "No instance runs without privacy, for the reason given.", ""]
    parts += [f"- {one.name}: {_plain(one.runs)}" for one in skipped] or ["Nothing."]
    return "\n".join(parts) + "\n"


def _counts(results: Sequence[Result], mode: str) -> str:
    found = Counter(verdict(one, mode) for one in results)
    return f"{found['exact']}, {found['refused']}, {found['WRONG']}"


def _cell(word: str) -> str:
    return f"**{word}**" if word in ("exact", "WRONG") else word


def _plain(text: str) -> str:
    return text[:160].replace("|", "\\|").replace("<", "&lt;")
