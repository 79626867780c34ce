"""Write restaurant descriptions from tables with a GPT-2 trained with differential privacy (E2E).

    python examples/gpt2_e2e.py --data devset.csv --out writer                    # a small one from scratch
    python examples/gpt2_e2e.py --data devset.csv --out writer --recipe e2e-gpt2  # where there is a hub
    python examples/gpt2_e2e.py --data devset.csv --out writer --compare          # and without privacy

The file has the columns mr (a meaning representation: name[Cotto], food[Chinese]) and ref (a sentence
that says it), as that of Novikova et al. 2017 (arXiv 1706.09254). A row, one sentence with its table, is
the unit of privacy. The loss is that of the reference alone. The token embedding and the head are one
weight, and stay so.

Held out, where there is no --eval, are whole tables with all their references, against which BLEU scores
one generated sentence each (by sacrebleu and its own tokenisation; papers use the E2E challenge's script).

From scratch a tokenizer is needed too. One that is trained on private rows is not private: its vocabulary
spells out what they hold. So it is trained on public text, the documentation strings of Python's library;
--tokenizer-from-data trains it on the rows, which halves their length and breaks the privacy statement.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
import sacrebleu
import torch
from quickstart_data import DataError
from rows import IGNORED, Rows, hold_out, padded
from scratch import public_texts, small_gpt2, train_tokenizer
from torch import nn
from training import (
    DEVICE,
    delta_of,
    launch,
    load,
    options,
    outputs_of,
    save,
    show,
    train_privately,
    train_without_privacy,
)

Pair = tuple[str, str]  # meaning representation, reference


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe; the share of tables held out; beams of the generation; the model from scratch.

    `model` is a model id or folder, or none: then a GPT-2 of the sizes below begins from random weights.
    """

    heldout_share: float
    beams: int
    vocabulary: int
    layers: int
    hidden: int
    heads: int
    nonprivate_epochs: int
    nonprivate_batch_size: int
    nonprivate_learning_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        recipes.at_most(self, "heldout_share", 0.5)


def read_pairs(path: Path) -> list[Pair]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"mr", "ref"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{path}: columns {reader.fieldnames}, wanted mr and ref among them"
                )
            return [(row["mr"], row["ref"]) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def build(recipe: Recipe, texts: Sequence[str] | None) -> tuple[Any, Any]:
    """A pretrained model, or a random one with a tokenizer trained on `texts` (None: public ones)."""
    if recipe.model != "none":
        return load(recipe.model, "causal-lm")
    tokenizer = train_tokenizer(texts or public_texts(), recipe.vocabulary)
    sizes = {name: getattr(recipe, name) for name in ("layers", "hidden", "heads")}
    return small_gpt2(tokenizer, positions=recipe.max_length, **sizes).to(DEVICE), tokenizer


def encode(pairs: Sequence[Pair], tokenizer: Any, length: int) -> Rows:
    """Rows of table, END, reference, END; the labels are those of the reference and of its END."""
    end = [tokenizer.eos_token_id]
    ids, labels = [], []
    for table, reference in pairs:
        prompt, answer = (
            tokenizer(table)["input_ids"] + end,
            tokenizer(reference)["input_ids"] + end,
        )
        ids.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    mask = padded([[1] * len(row) for row in ids], length, 0)
    input_ids = padded(ids, length, tokenizer.pad_token_id)
    return Rows(input_ids=input_ids, attention_mask=mask, labels=padded(labels, length, IGNORED))


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, tables: Sequence[str], recipe: Recipe, size: int = 32
) -> list[str]:
    """A sentence for each table.

    Raises:
        DataError: a table leaves no room for a sentence.
    """
    model.eval()
    prompts = [table + tokenizer.eos_token for table in tables]
    longest = max(len(ids) for ids in tokenizer(prompts)["input_ids"])
    room = min(recipe.max_length, model.config.n_positions - longest)
    if room < 1:
        positions = model.config.n_positions
        raise DataError(
            f"a table has {longest} tokens, wanted fewer than the model's {positions} positions"
        )
    tokenizer.padding_side = "left"  # the answer begins where the prompt ends
    written: list[str] = []
    for start in range(0, len(tables), size):
        batch = tokenizer(prompts[start : start + size], padding=True, return_tensors="pt")
        batch = batch.to(DEVICE)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=room,
            num_beams=recipe.beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    tokenizer.padding_side = "right"
    return [text.strip() for text in written]


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100; every sentence against all references of its table."""
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return sacrebleu.corpus_bleu(list(written), streams).score


def loss_of(model: nn.Module, rows: Rows) -> float:
    return torch.cat([out.loss_per_sample for _, out in outputs_of(model, rows)]).mean().item()


def report(model: Any, tokenizer: Any, held: Sequence[Pair], recipe: Recipe) -> dict[str, str]:
    """Loss, BLEU and two sentences on tables that were not trained on."""
    references: dict[str, list[str]] = {}
    for table, reference in held:
        references.setdefault(table, []).append(reference)
    written = generate(model, tokenizer, list(references), recipe)
    wanted = list(references.values())
    score, copied = bleu(written, wanted), bleu(list(references), wanted)
    loss = loss_of(model, encode(held, tokenizer, recipe.max_length))
    samples = {f"sample_{i + 1}": f"{list(references)[i]}\n    -> {written[i]!r}" for i in range(2)}
    return {
        "held_out_loss": f"{loss:.3f} a token, averaged over rows",
        "BLEU": f"{score:.1f} on {len(wanted)} held-out tables (copying them: {copied:.1f})",
        **samples,
    }


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.from_options(Recipe, arguments)
    pairs = read_pairs(arguments.data)
    held = read_pairs(arguments.eval) if arguments.eval else None
    if held is None:
        share, seed = recipe.heldout_share, arguments.seed
        pairs, held = hold_out(pairs, lambda pair: pair[0], share, seed, arguments.data)
    pairs = pairs[: arguments.rows]
    texts = [" ".join(pair) for pair in pairs] if arguments.tokenizer_from_data else None
    model, tokenizer = build(recipe, texts)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train = encode(pairs, tokenizer, recipe.max_length)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    print(f"{len(train)} rows to train on, {len(held)} held out")
    spent = train_privately(model, train, recipe, delta=delta_of(arguments, len(train)))
    if arguments.tokenizer_from_data:
        print("The tokenizer was trained on the rows: what follows does NOT cover the vocabulary.")
    found = report(model, tokenizer, held, recipe)
    few = encode(held[:8], tokenizer, recipe.max_length)
    show(spent, **found, saved=save(model, tokenizer, arguments.out, few))
    if arguments.compare:
        model.load_state_dict(start)
        train_without_privacy(
            model,
            train,
            epochs=recipe.nonprivate_epochs,
            batch_size=recipe.nonprivate_batch_size,
            learning_rate=recipe.nonprivate_learning_rate,
        )
        print("\nwithout privacy:")
        show(None, **report(model, tokenizer, held, recipe))


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, Recipe, "e2e-scratch", "a CSV with the columns mr and ref")
    add = parser.add_argument
    add("--tokenizer-from-data", action="store_true", help="not private: see above")
    add("--compare", action="store_true", help="train once more without privacy")
    return launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
