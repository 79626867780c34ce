"""A batch that a class takes, labels included, made from its task and its config alone."""

from typing import Any

import torch

ROWS, SEQ, CHOICES = 4, 12, 3


def example_batch(
    task: str, config: Any, texts: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A batch with labels for a task.

    Args:
        task: dpzoo's name of it.
        config: the model's.
        texts: ``input_ids`` and ``attention_mask``, (rows, seq), and perhaps ``class``, (rows,); by
            default random tokens in rows of different lengths.

    Returns:
        What the model's forward takes; rows have different numbers of labels.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, max(high, 1), shape, generator=generator)

    if texts is None:
        mask = torch.ones(ROWS, SEQ, dtype=torch.long)
        for i, row in enumerate(mask):
            row[SEQ - i :] = 0
        # Well past the special tokens of every vocabulary, where it is large enough.
        ids = config.vocab_size // 2 + draw(config.vocab_size // 2, ROWS, SEQ)
        ids[mask == 0] = config.pad_token_id or 0
        texts = {"input_ids": ids, "attention_mask": mask}
    ids, mask = texts["input_ids"], texts["attention_mask"]
    if task in ("multiple-choice", "double-heads"):
        ids, mask = (t[:, None].repeat(1, CHOICES, 1) for t in (ids, mask))
        ids[:, 1:, 1] = config.vocab_size // 2  # choices that differ
    rows, seq = len(ids), ids.shape[-1]
    batch = {"input_ids": ids, "attention_mask": mask}
    classes = texts.get("class")
    if task in ("masked-lm", "causal-lm", "pre-training", "double-heads"):
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "token-classification":
        labels = draw(config.num_labels, *ids.shape)
        batch["labels"] = labels.masked_fill(mask == 0, -100)
    elif task == "question-answering":
        batch["start_positions"] = draw(seq // 2, rows)
        batch["end_positions"] = seq // 2 + draw(seq // 4, rows)
    elif task == "multiple-choice":
        batch["labels"] = draw(CHOICES, rows)
    elif task in ("sequence-classification", "next-sentence-prediction"):
        count = 2 if task == "next-sentence-prediction" else config.num_labels
        if getattr(config, "problem_type", None) == "multi_label_classification":
            batch["labels"] = draw(2, rows, count).float()
        elif count == 1:
            batch["labels"] = torch.rand(rows, generator=generator)
        else:
            given = classes is not None and int(classes.max()) < count
            batch["labels"] = classes if given and classes is not None else draw(count, rows)
    if task == "pre-training":
        batch["next_sentence_label"] = draw(2, rows)
    if task == "double-heads":
        batch["mc_labels"] = draw(CHOICES, rows)
        batch["mc_token_ids"] = mask.sum(-1) - 1
    return batch
