"""``dpzoo audit``: prove that a model's private training is right.

The audit itself knows no family; what a class takes as a batch is known by its task.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from typer import Argument, Option

from dpzoo.auditing import CHECKS, audit
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.own_batch import batch_of
from dpzoo.auditing.run import QUICK, chosen
from dpzoo.checkpoints import load, load_stock, reading
from dpzoo.cli.output import print_json, progress
from dpzoo.conversion import to_transformers
from dpzoo.errors import DpzooError, InputError, UnsupportedModelError
from dpzoo.example_batch import ROWS
from dpzoo.models.base import PerSampleModel
from dpzoo.models.fields import read_fields
from dpzoo.modes import MODES
from dpzoo.registry import FAMILIES, class_by_name, list_models

LONGEST = 32

AUTO = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "multiple-choice": "AutoModelForMultipleChoice",
    "question-answering": "AutoModelForQuestionAnswering",
    "next-sentence-prediction": "AutoModelForNextSentencePrediction",
    "pre-training": "AutoModelForPreTraining",
}
"""Task -> transformers' auto class."""

EPILOG = f"""\
PATH is a hub id or a folder. A model of dpzoo's families is audited as dpzoo's
class, in Opacus' modes hooks and ghost and in dpzoo's bk (--modes); any other
architecture as the stock class that it is, in bk, with the rows' losses by
dpzoo.ModelLoss. The batch is made from the config, unless --data gives rows.

verdict:
  A finding of severity privacy (the guarantee does not hold), crash (training
  stops) or utility (what is trained is not what was meant) fails the audit; a
  note does not. The table says ok or FAILED, report.ok,
  report.raise_if_failed() and the exit status say the same. "largest error" is
  the largest that a check measured, passed or not: relative to the gradient's
  largest entry, or, for what a row moves the clipped sum by, in clipping norms
  C: 1 is what it may.

exit status:
  0  ok
  1  the audit failed
  2  it could not run: a checkpoint that cannot be read, an option, rows that
     make no batch. With --json, standard output is
     {{"ok": false, "error": "..."}}

--quick is for a look, in mode bk with 3 rows, and with the checks
{fill(", ".join(QUICK), 78)}.

examples:
  dpzoo audit bert-base-uncased --task sequence-classification
  dpzoo audit Qwen/Qwen2.5-0.5B --quick        any architecture of transformers
  dpzoo audit bert-base-uncased --stock        what is wrong with stock
  dpzoo audit ./checkpoint --data rows.tsv     rows of your own
  dpzoo audit ./checkpoint --checks coverage,exactness --modes ghost --json
"""


@dataclass
class Options:
    """Check a model's per-sample gradients, norms, isolation, noise and more."""

    model: Annotated[str, Argument(metavar="PATH", help="a hub id or a folder with a checkpoint")]
    task: Annotated[str | None, Option(help="dpzoo's name; by default the checkpoint's")] = None
    stock: Annotated[bool, Option("--stock", help="audit transformers' own class instead")] = False
    data: Annotated[Path | None, Option(help="TAB-separated rows: text, and maybe a class")] = None
    modes: Annotated[str | None, Option(help=f"of {', '.join(MODES)}; see below")] = None
    checks: Annotated[str | None, Option(help=f"of {', '.join(CHECKS)}; all by default")] = None
    quick: Annotated[bool, Option("--quick", help="fewer checks and rows, mode bk")] = False
    max_grad_norm: Annotated[str, Option(metavar="C", help="the clipping norm C")] = "1.0"
    json: Annotated[bool, Option("--json", help="print the report as JSON")] = False


def run(options: Options) -> int:
    """Audit and print the report; 0 if it is ok, 1 if not."""
    # What is wrong with the options is said before anything is loaded.
    modes = options.modes.split(",") if options.modes is not None else None
    checks = options.checks.split(",") if options.checks is not None else None
    chosen(modes, checks, options.quick)
    clip = _number(options.max_grad_norm, "--max-grad-norm")
    texts = _texts(options)
    with progress() as say:
        say("loading")
        model = _load(options.model, options.task)
        ours = isinstance(model, PerSampleModel)
        if modes is None and not ours:
            modes = ["bk"]
        with _named(options.model, "gives no batch"):
            batch = batch_of(model, texts)
        if options.stock and ours:
            model = to_transformers(model)
        report = audit(
            model,
            batch,
            max_grad_norm=clip,
            modes=modes,
            checks=checks,
            quick=options.quick,
            progress=say,
        )
    if options.json:
        print_json(report.to_dict())
    else:
        sys.stdout.write(f"{report}\n")
    return int(not report.ok)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} got {text!r}, wanted a number above 0.")
    return value


# --- loading ------------------------------------------------------------------------------------


@contextmanager
def _named(source: str, what: str) -> Iterator[None]:
    """Whatever files from elsewhere provoke becomes one line that names them."""
    try:
        yield
    except DpzooError:
        raise
    except Exception as error:  # OSError's words have several lines
        raise InputError(f"{source} {what}: {first_line(error)}") from error


def _load(name: str, task: str | None) -> Any:
    """The model: dpzoo's where dpzoo has its class, else the stock one, with the checkpoint's weights.

    Raises:
        InputError: parameters are of other shapes than the config's, not finite, or missing below the head.
        UnsupportedModelError: neither the task nor the checkpoint says what class it is.
    """
    with reading(name) as where:
        fields = read_fields(name, **where)  # refuses sizes that no model has
        if fields.get("model_type") is None:
            raise InputError(f"{name} cannot be loaded: its config.json has no model_type.")
        config = AutoConfig.from_pretrained(name, **where)
    if _is_ours(config, task):
        model: Any = load(name, task)
    else:
        model = load_stock(_stock(config, name, task), name, config)
    broken = [key for key, value in model.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(
            f"{name} has {len(broken)} parameters with NaN or Inf: {broken[0]}. Wanted finite weights."
        )
    return model.float() if model.dtype == torch.float16 else model


def _is_ours(config: PreTrainedConfig, task: str | None) -> bool:
    if config.model_type not in FAMILIES:
        return False
    if task is not None:
        return task in list_models()[config.model_type] or task not in AUTO
    try:
        class_by_name((config.architectures or [""])[0])
    except UnsupportedModelError:
        return False
    return True


def _stock(config: PreTrainedConfig, name: str, task: str | None) -> Any:
    """The stock class of a task, or that the checkpoint was saved from."""
    if task is not None:
        if task not in AUTO:
            raise UnsupportedModelError(f"--task got {task!r}, wanted one of: {', '.join(AUTO)}.")
        return getattr(transformers, AUTO[task])
    saved_as = (config.architectures or [None])[0]
    found = getattr(transformers, saved_as or "", None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{name} was saved from {saved_as or 'a class that its config does not name'}, which the "
            f"installed transformers does not have. Pass --task, one of: {', '.join(AUTO)}."
        )
    return found


def _texts(options: Options) -> dict[str, torch.Tensor] | None:
    """The first rows of the data file, tokenized; None without one."""
    if options.data is None:
        return None
    with _named(str(options.data), "cannot be read"):
        text = options.data.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < ROWS:
        raise InputError(f"{options.data} has {len(lines)} rows, wanted at least {ROWS}.")
    cells = [line.split("\t") for line in lines[:ROWS]]
    with reading(options.model) as where:
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model, **where)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer(
            [cell[0] for cell in cells],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
    inputs: dict[str, Any] = dict(encoded)
    # Without its files, transformers makes a tokenizer of no words: every text is [UNK], or empty.
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    words = ~torch.isin(inputs["input_ids"], special) & (inputs["attention_mask"] != 0)
    if not bool(words.any(1).all()):
        row = int((~words.any(1)).nonzero()[0])
        raise InputError(
            f"The tokenizer of {options.model} knows no word of row {row + 1} of {options.data} "
            f"({cells[row][0][:40]!r}; it has {len(tokenizer)} words in all). Wanted the checkpoint's own "
            f"tokenizer beside it (tokenizer.json, vocab.txt, ...); without one, leave --data out."
        )
    if all(len(cell) > 1 and cell[1].strip().isdigit() for cell in cells):
        inputs["class"] = torch.tensor([int(cell[1]) for cell in cells])
    return inputs
