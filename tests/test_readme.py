"""What the README shows, runs; what it lists, exists. Hub names stand for tiny local checkpoints."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from opacus import PrivacyEngine
from transformers import AutoConfig

import dpzoo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def stock_model(architecture: str) -> transformers.PreTrainedModel:
    family = {"Bert": "bert", "Robe": "roberta", "Dist": "distilbert", "GPT2": "gpt2"}
    path = ROOT / "configs" / "models" / f"{family[architecture[:4]]}-tiny.json"
    return getattr(transformers, architecture)(AutoConfig.from_pretrained(path))


def run(block: str, replacements: dict[str, str], **names: object) -> dict[str, object]:
    for shown, used in replacements.items():
        assert shown in block, f"the README no longer has {shown}"
        block = block.replace(shown, used)
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_first_example_trains_every_parameter_and_saves_a_stock_checkpoint(
    tmp_path: Path,
) -> None:
    stock_model("BertForMaskedLM").save_pretrained(tmp_path / "hub")
    dataset = [
        {
            "input_ids": torch.randint(5, 61, (7,)),
            "attention_mask": torch.ones(7, dtype=torch.long),
            "labels": torch.tensor(row % 2),
        }
        for row in range(12)
    ]
    replacements = {
        '"bert-base-uncased"': repr(str(tmp_path / "hub")),
        '"out"': repr(str(tmp_path / "out")),
        "batch_size=256": "batch_size=4",
    }
    names = run(BLOCKS[0], replacements, dataset=dataset)

    before = transformers.BertForMaskedLM.from_pretrained(tmp_path / "hub").bert.state_dict()
    after, report = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    moved = {
        name: not torch.equal(parameter, before[name])
        for name, parameter in after.bert.named_parameters()
        if name in before  # the pooler is new
    }
    assert all(moved.values()), sorted(name for name in moved if not moved[name])
    batch = {"input_ids": dataset[0]["input_ids"].unsqueeze(0)}
    trained = names["model"].eval()
    torch.testing.assert_close(after(**batch).logits, trained(**batch).logits)


@pytest.mark.parametrize("index", [1, 4], ids=["ghost", "bk"])
def test_modes_with_a_criterion_are_used_as_shown(index: int) -> None:
    ids = torch.randint(5, 61, (12, 7))
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    model = dpzoo.convert(stock_model("GPT2LMHeadModel")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(
        BLOCKS[index],
        {},
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loader=torch.utils.data.DataLoader(dataset, batch_size=6),
        PrivacyEngine=PrivacyEngine,
        dpzoo=dpzoo,
    )
    after = model.state_dict()
    assert [name for name in after if torch.equal(after[name], before[name])] == []


def test_the_ways_in_and_out_are_as_shown(tmp_path: Path) -> None:
    stock_model("RobertaForMaskedLM").save_pretrained(tmp_path / "roberta")
    stock_model("BertForMaskedLM").save_pretrained(tmp_path / "bert")
    stock_model("DistilBertForMaskedLM").save_pretrained(tmp_path / "checkpoint")
    replacements = {
        '"roberta-base"': repr(str(tmp_path / "roberta")),
        '"bert-base-uncased"': repr(str(tmp_path / "bert")),
        '"path/to/checkpoint"': repr(str(tmp_path / "checkpoint")),
        '"path/to/config.json"': repr(str(ROOT / "configs" / "models" / "gpt2-tiny.json")),
    }
    names = run(BLOCKS[2], replacements, stock_model=stock_model("GPT2LMHeadModel"), dpzoo=dpzoo)
    assert type(names["stock_model"]) is transformers.GPT2LMHeadModel
    assert type(names["model"]) is dpzoo.GPT2LMHeadModel


def test_the_audit_is_used_as_shown() -> None:
    ids = torch.randint(5, 61, (4, 7))
    model = dpzoo.convert(stock_model("GPT2LMHeadModel"))
    names = run(BLOCKS[3], {}, model=model, batch={"input_ids": ids, "labels": ids}, dpzoo=dpzoo)
    assert names["report"].ok


def test_the_trainer_is_used_as_shown(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.randint(5, 61, (7,)), "labels": row % 2} for row in range(12)]
    names = run(
        BLOCKS[5],
        {'"out"': repr(str(tmp_path / "out"))},
        model=stock_model("BertForSequenceClassification"),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True
        ),
        train_dataset=rows,
        tokenizer=None,
    )
    assert 0 < names["trainer"].epsilon <= 8
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")


def test_every_block_has_its_test() -> None:
    assert len(BLOCKS) == 6


def test_the_table_is_the_registry() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|(.*)\|$", README, flags=re.MULTILINE)
    families = ("bert", "roberta", "distilbert", "gpt2")
    table: dict[str, dict[str, str]] = {family: {} for family in families}
    for task, cells in rows:
        for family, cell in zip(families, cells.split("|"), strict=True):
            if cell.strip():
                table[family][task] = cell.strip(" `")
    assert table == dpzoo.list_models()
    assert sum(len(classes) for classes in table.values()) == 28
