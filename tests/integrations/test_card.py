"""What is saved says what it cost, and nothing that is secret or shows training rows' losses."""

import fnmatch
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import dpzoo
from dpzoo.integrations import PrivacyCard
from dpzoo.integrations import publishing as module
from dpzoo.integrations.card import UNPUBLISHED
from dpzoo.integrations.plan import rounded_up
from tests.integrations.runs import BERT, LOG, arguments, trainer_of
from tests.support import stock_model


@pytest.fixture(scope="module")
def start() -> Any:
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(BERT, torch.float32))


def test_a_saved_model_has_its_card(start: Any, tmp_path: Path) -> None:
    private = {"target_epsilon": 3.0, "noise_seed": None, "tuned": "rates, on public reviews"}
    trainer = trainer_of(start, tmp_path / "run", private, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "privacy.json").read_text())
    assert saved["epsilon"] == trainer.epsilon
    assert 2.9 < saved["epsilon"] <= 3.0
    expected = {
        "unit": "one row of the training data",
        "neighbours": "adding or removing one unit",
        "delta": 1 / 16,
        "accountant": "rdp",
        "noise_multiplier": trainer.noise_multiplier,
        "sample_rate": 0.5,
        "steps": 4,
        "units": 16,
        "clipping_norm": 0.5,
        "clipping": "flat",
        "tuned": "rates, on public reviews",
    }
    assert {key: saved[key] for key in expected} == expected
    assert saved["versions"]["dpzoo"] == dpzoo.__version__
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert {"differential-privacy", "dpzoo"} <= set(card.data.tags)
    for value in (f"**{rounded_up(saved['epsilon'])}**", "Poisson, rate 0.5", "public reviews"):
        assert value in card.text
    # A checkpoint has the card too, and the privacy.json that it is resumed by.
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert "Epsilon" in (checkpoint / "README.md").read_text()
    assert json.loads((checkpoint / "privacy.json").read_text())["steps"] == 2
    secrets = [f"{trainer._batch_key:x}", str(trainer._batch_key)]
    for path in (*(tmp_path / "saved").iterdir(), checkpoint / "privacy.json"):
        text = path.read_bytes().decode("latin-1")
        assert not any(secret in text for secret in secrets), path
        assert "not_private" not in path.name


def test_a_readme_that_is_there_stays(start: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out" / "README.md"
    readme.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nHow to use it.\n")
    trainer = trainer_of(start, tmp_path / "run", max_steps=1)
    trainer.train()
    for _ in range(2):
        trainer.save_model(str(tmp_path / "out"))
    card = ModelCard.load(readme)
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", "differential-privacy", "dpzoo"]
    assert card.text.startswith("# Mine\n\nHow to use it.\n")
    assert card.text.count("## Privacy") == 1


def test_a_model_without_a_guarantee_says_so(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path / "a", {"noise_multiplier": 0.0}, max_steps=1)
    trainer.save_model(str(tmp_path / "untrained"))
    text = (tmp_path / "untrained" / "README.md").read_text()
    assert "**no** privacy guarantee from training: they have not been trained" in text
    trainer.train()
    trainer.save_model(str(tmp_path / "noiseless"))
    text = (tmp_path / "noiseless" / "README.md").read_text()
    assert "**no** privacy guarantee from training: no noise was added" in text
    assert "| Epsilon | none |" in text
    assert "whoever knows it can take the noise off" in text  # these runs have a seed
    assert json.loads((tmp_path / "noiseless" / "privacy.json").read_text())["epsilon"] is None


def test_losses_of_training_rows_stay_out(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, max_steps=2, **LOG)
    result = trainer.train()
    assert "loss" in trainer.state.log_history[0]
    history = list(trainer.state.log_history)
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    trainer.create_model_card(license="mit")
    assert trainer.state.log_history == history
    for name in ("trainer_state.json", "train_results.json", "all_results.json"):
        text = (tmp_path / name).read_text()
        assert '"epsilon"' in text
        assert "loss" not in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert str(history[0]["loss"]) not in card.text


def test_what_is_uploaded(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Hub:
        def upload_folder(self, **given: Any) -> str:
            calls.append(given)
            return "uploaded"

    monkeypatch.setattr(module, "HfApi", Hub)
    trainer = trainer_of(start, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.hub_model_id = "somebody/model"
    trainer.train()
    assert trainer.push_to_hub(license="mit") == "uploaded"
    trainer.args.hub_strategy = module.HubStrategy.EVERY_SAVE
    trainer._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert [call["repo_id"] for call in calls] == ["somebody/model"] * 2

    def kept(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, p) for p in calls[0]["ignore_patterns"])

    for name in ("README.md", "privacy.json", "model.safetensors", "config.json", "tokenizer.json"):
        assert kept(name)
        assert name.startswith("tokenizer") or (tmp_path / "run" / name).is_file()
    for name in (
        *("checkpoint-2/privacy_random_state.pt", "checkpoint-2/trainer_state.json"),
        *("trainer_state.json", "runs/Nov28/events.out.tfevents.1", "train_results.json"),
        *("privacy_ledger.jsonl", "privacy_ledger.jsonl.lock", "statistics_not_private.jsonl"),
    ):
        assert not kept(name), name
    assert calls[0]["ignore_patterns"] == list(UNPUBLISHED)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.9913, "3"),
        (1.9942, "2"),
        (1.9842, "1.99"),
        (8.0, "8"),
        (0.00075019, "0.000751"),
        (0, "0"),
    ],
)
def test_bounds_are_rounded_up(value: float, text: str) -> None:
    assert rounded_up(value) == text
    assert rounded_up(math.inf) == "inf"


def test_the_statement_names_all_terms() -> None:
    card = PrivacyCard(1.234, 1e-5, "prv", 0.9, 0.1, 0.02, 100, 5000, "all")
    said = card.statement()
    for term in ("epsilon 1.24 at delta 1e-05 (prv)", "100 steps", "noise multiplier 0.9"):
        assert term in said
    for term in ("clipping norm 0.1", "sample rate 0.02 of 5000 units", "one row"):
        assert term in said


def test_the_terms_are_in_the_last_log_entry(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, max_steps=1)
    metrics = trainer.train().metrics
    terms = {"delta": 1 / 16, "noise_multiplier": 1.0, "clipping_norm": 0.5, "sample_rate": 0.5}
    assert {key: metrics[key] for key in terms} == terms
    assert arguments(tmp_path).output_dir == trainer.args.output_dir
