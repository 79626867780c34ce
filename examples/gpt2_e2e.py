"""Write restaurant descriptions from tables with a GPT-2 trained with differential privacy (E2E).

    python examples/gpt2_e2e.py --data devset.csv --out writer                    # a small one from scratch
    python examples/gpt2_e2e.py --data devset.csv --out writer --recipe e2e-gpt2  # where there is a hub
    python examples/gpt2_e2e.py --data devset.csv --out writer --compare          # and without privacy

The file has the columns mr (a table: name[Cotto], food[Chinese]) and ref (a sentence that says it), as
that of Novikova et al. 2017 (arXiv 1706.09254). A row, a sentence with its table, is the unit of
privacy. The loss is the reference's. Whole tables are held out. BLEU is sacrebleu's; papers use the E2E
challenge's script.

From scratch a tokenizer is needed too. One that is trained on private rows is not private: its
vocabulary spells out what they hold. --tokenizer-from-data does that, and breaks the privacy statement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import recipes, training
from support.generation import Pair, bleu, generate, read_pairs
from support.rows import IGNORED, Rows, hold_out, labelled
from support.scratch import build


@dataclass(frozen=True)
class Recipe(recipes.TrainingRecipe):
    """A training recipe; beams of the generation; a model from scratch, where `model` is none."""

    beams: int
    vocabulary: int
    layers: int
    hidden: int
    heads: int
    nonprivate_epochs: int
    nonprivate_batch_size: int
    nonprivate_learning_rate: float


def encode(pairs: Sequence[Pair], tokenizer: Any, length: int) -> Rows:
    """Rows of table, END, reference, END; the labels are those of the reference and of its END."""
    end = [tokenizer.eos_token_id]
    ids, labels = [], []
    for table, reference in pairs:
        prompt, answer = (tokenizer(text)["input_ids"] + end for text in (table, reference))
        ids.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    return labelled(ids, labels, length, tokenizer.pad_token_id)


def report(model: Any, tokenizer: Any, held: Sequence[Pair], recipe: Recipe) -> dict[str, str]:
    """Loss, BLEU and two sentences on tables that were not trained on."""
    references: dict[str, list[str]] = {}
    for table, reference in held:
        references.setdefault(table, []).append(reference)
    size = {"length": recipe.max_length, "beams": recipe.beams}
    written = generate(model, tokenizer, list(references), **size)
    wanted = list(references.values())
    score, copied = bleu(written, wanted), bleu(list(references), wanted)
    outputs = training.outputs_of(model, encode(held, tokenizer, recipe.max_length))
    loss = torch.cat([out.loss_per_sample for _, out in outputs]).mean().item()
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
    delta = training.delta_of(arguments, len(train))
    spent = training.train_privately(model, train, recipe, delta=delta)
    if arguments.tokenizer_from_data:
        print("The tokenizer was trained on the rows: what follows does NOT cover the vocabulary.")
    found = report(model, tokenizer, held, recipe)
    few = encode(held[:8], tokenizer, recipe.max_length)
    training.show(spent, **found, saved=training.save(model, tokenizer, arguments.out, few))
    if arguments.compare:
        model.load_state_dict(start)
        names = ("epochs", "batch_size", "learning_rate")
        options = {name: getattr(recipe, f"nonprivate_{name}") for name in names}
        training.train_without_privacy(model, train, **options)
        print("\nwithout privacy:")
        training.show(None, **report(model, tokenizer, held, recipe))


def main(argv: Sequence[str] | None = None) -> int:
    parser = training.options(__doc__, Recipe, "e2e-scratch", "a CSV with the columns mr and ref")
    for name, said in {
        "tokenizer-from-data": "not private",
        "compare": "and without privacy",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{said}: see above")
    return training.launch(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
