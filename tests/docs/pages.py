"""What the pages of docs/ show: their blocks of code, and the names that these start from."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

import dpzoo

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OWN_TESTS = {
    "adding-a-family",
    "distributed",
    "empirical-audit",
    "reliability",
    "train",
    "units",
    "who-gets-it-right",
}
"""Pages whose blocks and commands have tests of their own."""
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in OWN_TESTS)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page, by its name without .md; of README.md by "README"."""
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def after(diff: str) -> str:
    """What a diff leaves: unchanged and added lines."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-"))


def run(page: str, code: list[str], **names: Any) -> dict[str, Any]:
    """Run blocks one after the other in one namespace."""
    for block in code:
        exec(compile(block, f"{page}.md", "exec"), names)
    return names


def hub(folder: Path) -> None:
    """Tiny checkpoints under the hub's names: transformers takes a folder of that name for the model."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *("a", "fine", "dull", "film", "great", "fun", "waste", "of", "time"),
    ]
    for name, config in {
        "bert-base-uncased": transformers.BertForMaskedLM,
        "roberta-base": transformers.RobertaForMaskedLM,
        "path/to/checkpoint": transformers.DistilBertForMaskedLM,
    }.items():
        (folder / name).mkdir(parents=True)
        family = config.config_class.model_type
        tiny = transformers.AutoConfig.from_pretrained(
            ROOT / "configs/models" / f"{family}-tiny.json"
        )
        config(tiny).save_pretrained(folder / name)
        vocabulary = {word: i for i, word in enumerate(words)}
        transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / name)
    (folder / "path/to/config.json").write_text(
        (ROOT / "configs/models/gpt2-tiny.json").read_text(encoding="utf-8"), encoding="utf-8"
    )


def rows(count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Rows of a classifier, as tokenized texts are."""
    return [
        {
            "input_ids": torch.randint(5, 61, (7,)),
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.tensor(row % 2),
        }
        for row in range(count)
    ]


def stock(architecture: str = "BertForSequenceClassification") -> Any:
    """A tiny stock model."""
    family = getattr(transformers, architecture).config_class.model_type
    path = ROOT / "configs" / "models" / f"{family}-tiny.json"
    return getattr(transformers, architecture)(transformers.AutoConfig.from_pretrained(path))


def objects(model: Any, size: int = 4) -> dict[str, Any]:
    """A model, its optimizer and loader, as a user has them before make_private."""
    return {
        "model": model.train(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(rows(), batch_size=size),
    }


def given(page: str) -> dict[str, Any]:
    """The names that a page takes as known."""
    if page == "choose":
        return {"texts": ["a fine film", "a dull film"] * 6, "labels": torch.tensor([1, 0] * 6)}
    if page == "zoo":
        return {
            **objects(dpzoo.convert(stock())),
            "dpzoo": dpzoo,
            "stock_model": stock("GPT2LMHeadModel"),
        }
    if page == "audit":
        model = dpzoo.convert(stock())
        private, optimizer, criterion, loader = (engine := dpzoo.PrivacyEngine()).make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=dpzoo.ModelLoss(model),
            data_loader=DataLoader(rows(), batch_size=6),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="bk",
        )
        batch = {name: torch.stack([row[name] for row in rows(5)]) for name in rows(1)[0]}
        return {
            "model": dpzoo.convert(stock()),
            "stock_model": stock(),
            "batch": batch,
            "private": private,
            "optimizer": optimizer,
            "criterion": criterion,
            "loader": loader,
            "engine": engine,
        }
    if page == "trainer":
        arguments = transformers.TrainingArguments(
            output_dir="run", max_steps=2, report_to=[], use_cpu=True
        )
        return {
            "model": stock(),
            "training_args": arguments,
            "train_dataset": rows(16),
            "eval_dataset": rows(4),
            "tokenizer": None,
            "compute_metrics": None,
        }
    return {}
