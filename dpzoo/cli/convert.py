"""``dpzoo convert``: any checkpoint of the four families to a verified stock safetensors one."""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from transformers import AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from typer import Argument, Option

from dpzoo.checkpoints import reading, some
from dpzoo.cli.output import Say, print_json, print_table, progress
from dpzoo.errors import InputError
from dpzoo.files import whole_folder
from dpzoo.parity import Parity, convert_checkpoint

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
"""Files that the tokenizers of the four families are made of, one of which each has."""

EPILOG = """\
SRC is a hub id or a folder; whatever transformers reads is read: safetensors,
pytorch_model.bin, shards, old key names. OUT is a folder with config.json,
model.safetensors, the generation config if there is one, and the tokenizer.
transformers loads it without dpzoo. Nothing else is copied (model card,
pooling settings of sentence encoders).

Compared before OUT appears, and shown as a table:
  parameters   stock, dpzoo and written ones are equal bit by bit
  config       stock and written one are equal, field by field
  outputs      stock from SRC, dpzoo, and stock from OUT, hidden states
               included, on one padded batch of random tokens, in float64
               (float32 beyond 400 million parameters)
  gradients    of every row's loss: the row alone in stock, the row in its batch
               in dpzoo
That takes memory for three models and two gradients in that dtype: 40 bytes a
parameter, 20 beyond 400 million. OUT is written beside its place and renamed at
the end: if a comparison fails there is no OUT, and whenever it is stopped, what
was there before is there still.

A new head for --task is random, from a fixed seed. SRC must have everything
that the class has that it was saved from, with finite values; --fresh makes
what it lacks random too. What is random is listed, and so are the weights of
SRC that the class does not have, which OUT does not have either.

exit status:
  0  OUT was written, and everything is equal
  1  a comparison failed; nothing was written
  2  it could not run: SRC cannot be read, OUT exists, dpzoo does not have the
     class

examples:
  dpzoo convert bert-base-uncased ./bert
  dpzoo convert ./old-checkpoint ./new --task sequence-classification
  dpzoo convert microsoft/DialoGPT-large ./dialogpt --dtype float32
  dpzoo convert ./checkpoint ./out --overwrite --json > parity.json
"""


@dataclass
class Options:
    """Load a checkpoint, send it through dpzoo, prove that nothing changed, write it."""

    source: Annotated[str, Argument(metavar="SRC", help="a hub id or a folder with a checkpoint")]
    target: Annotated[Path, Argument(metavar="OUT", help="the folder to write")]
    task: Annotated[str | None, Option(help="dpzoo's name; by default the checkpoint's")] = None
    family: Annotated[str | None, Option(help="where config.json has no model_type")] = None
    dtype: Annotated[Dtype | None, Option(help="of OUT's weights; by default as stored")] = None
    fresh: Annotated[bool, Option("--fresh", help="random parameters where SRC lacks some")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="replace a checkpoint at OUT")] = False
    json: Annotated[bool, Option("--json", help="print the figures as JSON")] = False


def run(options: Options) -> int:
    """Convert and print the figures; 1, and no OUT, if they are not what they should be.

    Raises:
        InputError: OUT cannot be written to, or SRC cannot be read.
        DpzooError: SRC is nothing that dpzoo has.
    """
    refuse_target(options.source, options.target, options.overwrite)
    transformers_logging.disable_progress_bar()  # of saving: ours says what is done
    with progress() as say, whole_folder(options.target) as folder:
        parity = convert_checkpoint(
            options.source,
            folder,
            task=options.task,
            family=options.family,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            fresh=options.fresh,
            say=say,
        )
        tokenizer = _copy_tokenizer(options.source, folder, say) if parity.ok else None
        if not parity.ok:
            shutil.rmtree(folder)
    written = str(options.target) if parity.ok else None
    if options.json:
        data = {
            **asdict(parity),
            "ok": parity.ok,
            "written": written,
            "tokenizer": tokenizer is None,
        }
        print_json(data)
    else:
        print_parity(parity)
        sys.stdout.write(_verdict(parity, options.target, tokenizer))
    return 0 if parity.ok else 1


def print_parity(parity: Parity) -> None:
    """The comparisons as a table, and what the source lacked or had too much of."""
    rows: list[tuple[str | None, ...]] = [
        (
            check.name,
            f"{check.error:.1e}" if check.tolerance else f"{check.error:.0f}",
            f"{check.tolerance:.0e}" if check.tolerance else "0",
            "ok" if check.ok else "FAILED",
            check.where if not check.ok else None,
        )
        for check in parity.checks
    ]
    title = (
        f"{parity.model} ({parity.task}), {parity.parameters / 1e6:.1f} million parameters, stored in "
        f"{parity.stored}, compared in {parity.compared}"
    )
    header = ["compared", "difference", "allowed", "", "where"]
    if parity.ok:
        header, rows = header[:-1], [row[:-1] for row in rows]
    print_table(header, rows, title=title, numbers=("difference", "allowed"))
    for names, text in (
        (parity.fresh, "random, because the source does not have them"),
        (parity.unused, "left out, because the class does not have them"),
    ):
        if names:
            sys.stdout.write(f"{text}: {some(names)}\n")


def _verdict(parity: Parity, target: Path, tokenizer: str | None) -> str:
    if not parity.ok:
        return f"FAILED: {target} was not written\n"
    without = f"no tokenizer was copied: {tokenizer}\n" if tokenizer else ""
    return f"{without}written: {target}\n"


# --- files --------------------------------------------------------------------------------------


def refuse_target(source: str, target: Path, overwrite: bool) -> None:
    """Refuse to write where something is that would be lost.

    Raises:
        InputError: OUT exists and ``overwrite`` is off, OUT is no checkpoint, or SRC is in it.
    """
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder, so {target} cannot be written. Create it.")
    if not target.exists():
        return
    if not overwrite:
        raise InputError(f"{target} exists. Name another folder, or pass --overwrite.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise InputError(
            f"{target} is no checkpoint (no config.json in it), so --overwrite does not replace it. "
            f"Name another folder."
        )
    place = Path(source)
    if place.exists() and place.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} is, or contains, the source {source}. Name another folder.")


def _copy_tokenizer(source: str, folder: Path, say: Say) -> str | None:
    """Write the source's tokenizer beside the weights; the reason where there is none."""
    say("copying the tokenizer")
    with reading(source) as where:
        # transformers makes an empty tokenizer of a source that has none.
        found = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
            for name in VOCABULARIES
        )
        if not any(found):
            return "the source has no vocabulary file"
    try:
        with reading(source) as where:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except InputError as error:  # whatever its files provoke: the weights are right without it
        return str(error)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers' library has no kind of its own for a full disk
        raise OSError(f"the tokenizer of {source} cannot be written: {error}") from error
    return None
