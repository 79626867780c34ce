"""The text classifier of Opacus' tutorial, with the model's construction changed and nothing else.

    python examples/opacus_tutorial.py                 # the upper layers, in Opacus' default mode, hooks
    python examples/opacus_tutorial.py --mode ghost    # the same with ghost clipping
    python examples/opacus_tutorial.py --train all     # every parameter, position embeddings included
    python examples/opacus_tutorial.py --model bert-base-cased --data snli.tsv

The tutorial, https://opacus.ai/tutorials/building_text_classifier, fine-tunes BERT on SNLI with all
frozen but the last encoder layer, the pooler and the classifier. So does this by default, with its
hyper-parameters. `--train all` freezes nothing; with transformers' class, the first step then fails. A
file has lines of text<TAB>label, or text<TAB>text<TAB>label for pairs; SNLI's becomes one by

    awk -F'\\t' 'NR > 1 && $1 != "-" {print $6 "\\t" $7 "\\t" $1}' snli_1.0_train.txt > snli.tsv
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from support.models import minilm_folder
from support.texts import read_rows
from support.training import DEVICE
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, PreTrainedModel

import dpzoo

Rows = list[tuple[str, ...]]  # one or two texts, and the label


def build_model(name: str, labels: list[str], train: str) -> PreTrainedModel:
    """The one line that changes: the tutorial's class has the same name, and is transformers'."""
    names = dict(enumerate(labels))
    model = dpzoo.BertForSequenceClassification.from_pretrained(name, id2label=names)
    if train == "top":
        model.requires_grad_(False)
        for part in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
            part.requires_grad_(True)
    return model.to(DEVICE).train()


def encode(rows: Rows, tokenizer: Any, labels: list[str], width: int) -> TensorDataset:
    """Ids, mask and token types, each (rows, width), and label indices (rows,)."""
    *texts, names = (list(column) for column in zip(*rows, strict=True))
    options = {"padding": "max_length", "truncation": True, "max_length": width}
    encoded = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True, **options)
    inputs = (encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids"))
    return TensorDataset(*inputs, torch.tensor([labels.index(name) for name in names]))


def classify(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, labels) and label indices (rows,)."""
    ids, mask, types, labels = (tensor.to(DEVICE) for tensor in batch)
    return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits, labels


def run(arguments: argparse.Namespace) -> tuple[PreTrainedModel, float]:
    """The trained model, and epsilon."""
    torch.manual_seed(arguments.seed)
    parts = read_rows(arguments.data)
    labels = sorted({row[-1] for part in parts for row in part})  # counts as public
    name = str(arguments.model or minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, test = (encode(part, tokenizer, labels, arguments.max_length) for part in parts)
    model = build_model(name, labels, arguments.train)

    engine, criterion, delta = PrivacyEngine(), nn.CrossEntropyLoss(), 1 / len(train)
    private, optimizer, *ghost, loader = engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.AdamW(model.parameters(), lr=5e-4, eps=1e-8),
        criterion=criterion, data_loader=DataLoader(train, batch_size=32), epochs=arguments.epochs,
        target_epsilon=7.5, target_delta=delta, max_grad_norm=0.1, grad_sample_mode=arguments.mode,
    )  # fmt: skip
    if ghost:  # this mode has a criterion of its own, whose backward() clips
        (criterion,) = ghost
    for epoch in range(1, arguments.epochs + 1):
        options = {"max_physical_batch_size": 8, "optimizer": optimizer}
        with BatchMemoryManager(data_loader=loader, **options) as batches:
            for batch in batches:
                optimizer.zero_grad()
                criterion(*classify(private, batch)).backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            pairs = [classify(model, batch) for batch in DataLoader(test, batch_size=32)]
        right = sum(int((logits.argmax(1) == wanted).sum()) for logits, wanted in pairs)
        model.train()
        print(f"epoch {epoch}: accuracy {right / len(test):.3f} on {len(test)} other rows,")
        print(f"    epsilon {engine.get_epsilon(delta):.2f} at delta {delta:.1e}")
    return model, engine.get_epsilon(delta)


def main(argv: Sequence[str] | None = None) -> tuple[PreTrainedModel, float]:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--mode", choices=("hooks", "ghost"), default="hooks", help="Opacus' grad_sample_mode")
    add("--train", choices=("top", "all"), default="top", help="what is not frozen")
    add("--model", help="a BERT's model id or folder (default: all-MiniLM-L6-v2, from its wheel)")
    add("--data", type=Path, metavar="FILE.tsv")
    for name, default in {"epochs": 3, "max-length": 128, "seed": 0}.items():
        add(f"--{name}", type=int, default=default)
    warnings.filterwarnings("ignore", module="opacus")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
