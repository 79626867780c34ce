"""The text classifier of Opacus' tutorial, with the model's construction changed and nothing else.

    python examples/opacus_tutorial.py                 # the upper layers, in Opacus' default mode, hooks
    python examples/opacus_tutorial.py --mode ghost    # the same with ghost clipping
    python examples/opacus_tutorial.py --train all     # every parameter, position embeddings included
    python examples/opacus_tutorial.py --model bert-base-cased --data snli.tsv

The tutorial, https://opacus.ai/tutorials/building_text_classifier, fine-tunes BERT on SNLI with all frozen
but the last encoder layer, the pooler and the classifier, and so does this by default, with the tutorial's
hyper-parameters. `--train all` freezes nothing; with transformers' class, the first step then fails. (Delta
is 1 / training rows here. The tutorial's 1 / batches would let a batch of rows be published as they are.)

Without --data the rows are those of the quickstart. A file has lines of text<TAB>label, or of
text<TAB>text<TAB>label for pairs of sentences; SNLI's becomes one by

    awk -F'\\t' 'NR > 1 && $1 != "-" {print $6 "\\t" $7 "\\t" $1}' snli_1.0_train.txt > snli.tsv
"""

from __future__ import annotations

import argparse
import statistics
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from every_parameter import minilm_folder
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from quickstart_data import docs_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, PreTrainedModel

import dpzoo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Path(__file__).resolve().parent.parent / "configs" / "models" / "bert-tiny.json"

Rows = list[tuple[str, ...]]  # one or two texts, and the label


def build_model(arguments: argparse.Namespace, labels: list[str]) -> PreTrainedModel:
    """The one thing that changes: the tutorial's class has the same name, and is transformers'."""
    names = dict(enumerate(labels))
    if arguments.tiny:
        return dpzoo.from_config(str(TINY), task="sequence-classification", id2label=names)
    name = arguments.model or minilm_folder()
    return dpzoo.BertForSequenceClassification.from_pretrained(name, id2label=names)


def freeze_all_but_the_top(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    for part in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
        part.requires_grad_(True)


def read_rows(path: Path | None) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out (of a file, its last tenth)."""
    if path is None:
        data = docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=500)
        train, test = ([(r.text, str(r.label)) for r in p] for p in (data.train, data.heldout))
        return train, test
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [tuple(line.split("\t")) for line in lines if line.strip()]
    if len(rows) < 10 or {len(row) for row in rows} not in ({2}, {3}):
        raise SystemExit(f"error: {path}: wanted ten lines or more of text<TAB>[text<TAB>]label")
    return rows[: -len(rows) // 10], rows[-len(rows) // 10 :]


def checksum_tokenizer(*texts: Sequence[str], max_length: int, **_: Any) -> dict[str, Any]:
    """As much of a tokenizer as the tiny model needs: the id of a word is its checksum."""
    ids = torch.zeros(len(texts[0]), max_length, dtype=torch.long)
    for row, pair in zip(ids, zip(*texts, strict=True), strict=True):
        words = " [SEP] ".join(pair).split()[:max_length]
        row[: len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % 60 for word in words])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": 0 * ids}


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


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    pairs = [classify(model, batch) for batch in DataLoader(data, batch_size=32)]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    model.train()
    loss, hits = nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).float()
    return loss.item(), hits.mean().item()


def run(arguments: argparse.Namespace) -> tuple[PreTrainedModel, float, float]:
    """The trained model, its accuracy on the rows held out, and epsilon."""
    torch.manual_seed(arguments.seed)
    train_rows, test_rows = read_rows(arguments.data)
    labels = sorted({row[-1] for row in train_rows + test_rows})  # counts as public
    tokenizer, width = checksum_tokenizer, 16
    if arguments.tiny:
        train_rows, test_rows = train_rows[:96], test_rows[:32]
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model or minilm_folder())
        width = arguments.max_length
    train, test = (encode(part, tokenizer, labels, width) for part in (train_rows, test_rows))

    model = build_model(arguments, labels).to(DEVICE).train()
    if arguments.train == "top":
        freeze_all_but_the_top(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{count:,} of {model.num_parameters():,} parameters are trained, on {len(train)} rows")

    engine, criterion, delta = PrivacyEngine(), nn.CrossEntropyLoss(), 1 / len(train)
    private, optimizer, *ghost, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-4, eps=1e-8),
        criterion=criterion,
        data_loader=DataLoader(train, batch_size=32),
        target_epsilon=7.5,
        target_delta=delta,
        epochs=arguments.epochs,
        max_grad_norm=0.1,
        grad_sample_mode=arguments.mode,
    )
    if ghost:  # this mode has a criterion of its own, whose backward() clips
        (criterion,) = ghost
    for epoch in range(1, arguments.epochs + 1):
        losses: list[float] = []
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=8, optimizer=optimizer
        ) as batches:
            for batch in batches:
                optimizer.zero_grad()
                loss = criterion(*classify(private, batch))
                loss.backward()
                optimizer.step()
                losses += [loss.item()] * len(batch[-1])  # a Poisson batch may be empty
        test_loss, accuracy = evaluate(private, test)
        train_loss, epsilon = statistics.fmean(losses), engine.get_epsilon(delta)
        print(
            f"epoch {epoch}: train loss {train_loss:.3f} (not private), held-out {test_loss:.3f},"
        )
        print(f"    accuracy {accuracy:.3f}, epsilon {epsilon:.2f} at delta {delta:.1e}")
    return model, accuracy, epsilon


def main(argv: Sequence[str] | None = None) -> tuple[PreTrainedModel, float, float]:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--mode", choices=("hooks", "ghost"), default="hooks", help="Opacus' grad_sample_mode")
    add("--train", choices=("top", "all"), default="top", help="what is not frozen")
    add("--model", help="a BERT's model id or folder (default: all-MiniLM-L6-v2, from its wheel)")
    add("--data", type=Path, metavar="FILE.tsv")
    add("--epochs", type=int, default=3)
    add("--max-length", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="a random model of toy size and few rows, for tests")
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
