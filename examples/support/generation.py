"""Table to text: pairs from the E2E challenge's file, generation, BLEU."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch

from support.data import DataError
from support.training import DEVICE

Pair = tuple[str, str]  # meaning representation, reference


def read_pairs(path: Path) -> list[Pair]:
    """The columns mr and ref of a CSV file.

    Raises:
        DataError: the file cannot be read, or has no such columns.
    """
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


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, tables: Sequence[str], *, length: int, beams: int, size: int = 32
) -> list[str]:
    """A sentence for each table, of at most `length` tokens, by beam search.

    Raises:
        DataError: a table leaves no room for a sentence.
    """
    model.eval()
    prompts = [table + tokenizer.eos_token for table in tables]
    longest = max(len(ids) for ids in tokenizer(prompts)["input_ids"])
    room = min(length, model.config.n_positions - longest)
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
            num_beams=beams,
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
