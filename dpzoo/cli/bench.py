"""``dpzoo bench``: what a private step costs, in time and memory."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dpzoo.bench import BASELINE, MODES, SETTINGS, Workload, bench
from dpzoo.bench.profiling import profile
from dpzoo.bench.report import refuse_plot
from dpzoo.bench.runner import pieces
from dpzoo.bench.workload import DTYPES, OPTIMIZERS, PRESETS
from dpzoo.cli.output import print_json, print_table, progress
from dpzoo.errors import InputError
from dpzoo.files import write_text

EPILOG = f"""\
presets (random weights; nothing is downloaded):
  {", ".join(PRESETS)}

settings:
  gradient   forward, backward, clipping and the optimizer's update, without noise
  step       the same with noise
  amortized  one physical batch of a logical one that is noised once; see --every

How it is measured: the modes run in turns, step by step, in one process; a figure is the median over
pairs of steps that ran next to each other, as a multiple of the step without privacy. Peak memory is
that of a fresh process for each mode, less what Python and the libraries take. Keep the machine idle.

exit status:
  0  measured; a mode that cannot run the model is in the table with its reason
  2  nothing could be measured

examples:
  dpzoo bench roberta-base --layers 4 --batch 8 --seq 128
  dpzoo bench roberta-base --layers 4 --shapes 8x128,32x32,4x256,2x512 --modes bk
  dpzoo bench gpt2 --layers 4 --modes hooks,ghost,bk --json
  dpzoo bench bert-base --batch 8 --seq 32,64,128,256 --settings step --plot growth.png
  dpzoo bench ./checkpoint --device cuda --dtype bfloat16
"""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "bench",
        help="measure what a private step costs",
        description="Time and peak memory of training steps, as multiples of the non-private one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", help="a preset, a class of dpzoo, a hub id or a folder")
    add("--task", help="dpzoo's name of the task; by default the preset's or the checkpoint's")
    add("--layers", type=int, help="layers in the place of the preset's")
    add("--lora", type=int, default=0, metavar="RANK", help="train LoRA adapters alone")
    add("--batch", default="8", metavar="ROWS[,...]", help="rows of a physical batch (8)")
    add("--seq", default="128", metavar="TOKENS[,...]", help="tokens of a row (128)")
    add("--shapes", metavar="ROWSxTOKENS[,...]", help="in the place of --batch and --seq")
    add("--modes", default="hooks,ghost,bk", help=f"of {','.join(MODES)}")
    add("--settings", default=",".join(SETTINGS), help=f"of {','.join(SETTINGS)}")
    add("--every", type=int, default=8, help="physical batches of a logical one, amortized (8)")
    add("--steps", type=int, default=7, help="timed steps of each mode and setting (7)")
    add("--warmup", type=int, default=2, help="steps before those (2)")
    add("--processes", type=int, default=3, help="of which peak memory is the middle; 0: none (3)")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="sgd")
    add("--dtype", choices=DTYPES, default="float32", help="bfloat16: under autocast")
    add("--device", help="cpu, cuda, ...; by default cuda where there is one")
    add("--threads", type=int, help="of the CPU; by default torch's choice")
    add(
        "--plot", type=Path, metavar="FILE", help="draw the growth of the ratios (.png, .svg, .pdf)"
    )
    add("--profile", type=Path, metavar="FILE", help="write torch.profiler's tables of a step")
    add("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
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


def shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
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
        reason = str(error).splitlines()[0]
    if reason:
        raise InputError(
            f"--device got {name!r} ({reason}), wanted one that is there: cpu, cuda, ..."
        )


def _number(text: str, name: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{name} got {text!r}, wanted whole numbers above 0, as in its --help.")
    return int(text)
