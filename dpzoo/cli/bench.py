"""``dpzoo bench``: what a private step costs, in time and memory."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal

import torch
from typer import Argument, Option

from dpzoo.bench import BASELINE, MODES, SETTINGS, Workload, bench
from dpzoo.bench.profiling import profile
from dpzoo.bench.report import refuse_plot
from dpzoo.bench.runner import pieces
from dpzoo.bench.workload import PRESETS
from dpzoo.cli.output import print_json, print_table, progress
from dpzoo.errors import InputError, first_line
from dpzoo.files import write_text

Dtype = Literal["float32", "bfloat16"]
EPILOG = f"""\
presets (random weights; nothing is downloaded):
{fill(", ".join(PRESETS), 78, initial_indent="  ", subsequent_indent="  ")}

settings:
  gradient   forward, backward, clipping and the optimizer's update, no noise
  step       the same with noise
  amortized  one physical batch of a logical one, which is noised once: --every

How it is measured: the modes run in turns, step by step, in one process; a
figure is the median over pairs of steps that ran next to each other, as a
multiple of the step without privacy. Peak memory is that of a fresh process for
each mode, less what Python and the libraries take. Keep the machine idle.

exit status:
  0  measured; a mode that cannot run the model is in the table with its reason
  2  nothing could be measured

examples:
  dpzoo bench roberta-base --layers 4 --batch 8 --seq 128
  dpzoo bench roberta-base --layers 4 --shapes 8x128,32x32,4x256 --modes bk
  dpzoo bench gpt2 --layers 4 --modes hooks,ghost,bk --json
  dpzoo bench bert-base --seq 32,64,128,256 --settings step --plot growth.png
  dpzoo bench ./checkpoint --device cuda --dtype bfloat16
"""


@dataclass
class Options:
    """Time and peak memory of training steps, as multiples of the non-private one."""

    model: Annotated[
        str, Argument(metavar="MODEL", help="a preset, a class of dpzoo, a hub id or a folder")
    ]
    task: Annotated[str | None, Option(help="dpzoo's name; by default the model's")] = None
    layers: Annotated[int | None, Option(help="layers in the place of the preset's")] = None
    lora: Annotated[int, Option(metavar="RANK", help="train LoRA adapters alone; 0: do not")] = 0
    batch: Annotated[str, Option(metavar="ROWS,...", help="rows of a physical batch")] = "8"
    seq: Annotated[str, Option(metavar="TOKENS,...", help="tokens of a row")] = "128"
    shapes: Annotated[str | None, Option(metavar="ROWSxTOKENS,...", help="instead of both")] = None
    modes: Annotated[str, Option(help=f"of {', '.join(MODES)}")] = "hooks,ghost,bk"
    settings: Annotated[str, Option(help="what is timed")] = ",".join(SETTINGS)
    every: Annotated[int, Option(help="physical batches of a logical one, amortized")] = 8
    steps: Annotated[int, Option(help="timed steps of each mode and setting")] = 7
    warmup: Annotated[int, Option(help="steps before those")] = 2
    processes: Annotated[int, Option(help="of which peak memory is the middle; 0: none")] = 3
    optimizer: Annotated[Literal["adamw", "sgd"], Option()] = "sgd"
    dtype: Annotated[Dtype, Option(help="bfloat16: under autocast")] = "float32"
    device: Annotated[str | None, Option(help="by default cuda where there is one")] = None
    threads: Annotated[int | None, Option(help="of the CPU; by default torch's choice")] = None
    plot: Annotated[Path | None, Option(help="draw the ratios' growth (.png, .svg, .pdf)")] = None
    profile: Annotated[Path | None, Option(help="write torch.profiler's tables of a step")] = None
    json: Annotated[bool, Option("--json", help="print everything as JSON")] = False


def run(options: Options) -> int:
    """Measure; returns the exit status."""
    if options.threads is not None:
        torch.set_num_threads(_number(str(options.threads), "--threads"))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    refuse_device(device)
    modes = [mode for mode in options.modes.split(",") if mode]
    workloads = [
        Workload(
            model=options.model,
            task=options.task,
            batch=batch,
            seq=seq,
            layers=options.layers,
            lora=options.lora,
            dtype=options.dtype,
            device=device,
            optimizer=options.optimizer,
        )
        for batch, seq in shapes(options)
    ]
    settings = [setting for setting in options.settings.split(",") if setting]
    if not settings:
        raise InputError(f"--settings got none, wanted some of: {', '.join(SETTINGS)}.")
    effort: dict[str, Any] = {
        "processes": options.processes,
        "steps": options.steps,
        "warmup": options.warmup,
    }
    if options.plot:
        refuse_plot(options.plot, workloads)
    if options.profile and not options.profile.parent.is_dir():
        raise InputError(f"--profile got {options.profile}, and its folder is none. Create it.")
    total = pieces(len(workloads), len({BASELINE, *modes}), len(settings), **effort)
    with progress(total) as say:
        report = bench(
            workloads, modes=modes, settings=settings, every=options.every, progress=say, **effort
        )
    if options.plot:
        report.plot(options.plot)
    if options.profile:
        write_text(options.profile, profile(workloads[0], [BASELINE, *modes]))
    if options.json:
        print_json(report.to_dict())
    else:
        heading, *rows = report.rows()
        print_table(heading, rows)
        for note in report.notes():
            sys.stdout.write(note + "\n")
    return 0


def shapes(options: Options) -> list[tuple[int, int]]:
    """(rows, tokens) of each workload.

    Raises:
        InputError: names what is not a number, or not two of them.
    """
    if options.shapes:
        found = []
        for text in options.shapes.split(","):
            rows, _, tokens = text.partition("x")
            found.append((_number(rows, "--shapes"), _number(tokens, "--shapes")))
        return found
    batches = [_number(text, "--batch") for text in options.batch.split(",")]
    lengths = [_number(text, "--seq") for text in options.seq.split(",")]
    return [(batch, seq) for batch in batches for seq in lengths]


def refuse_device(name: str) -> None:
    """Refuse a device that is none, or that this machine does not have.

    Raises:
        InputError: names it.
    """
    try:
        torch.empty(0, device=name)
        reason = "a device without numbers" if torch.device(name).type == "meta" else None
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    if reason:
        raise InputError(
            f"--device got {name!r} ({reason}), wanted one that is there: cpu, cuda, ..."
        )


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise InputError(f"{name} got {text!r}, wanted whole numbers above 0, as in its --help.")
    return int(text)
