"""The SST-2 study: its parts by themselves, and a tiny run of the whole command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sst2_model
import sst2_study
import torch
from sst2_opinions import BLAME, PRAISE, opinions
from support.data import Row
from support.texts import encode
from support.training import classes, load

from tests.examples.tiny import sentence

pytestmark = pytest.mark.usefixtures("quick_accountant")
Build = Callable[[str, str], Path]

TINY = (
    "--max-length 12 --opinions 12 --opinions-batch-size 6 --mean-layers 1 --first-layers 2 --epochs 4 "
    "--batch-size 30 --full-epochs 1 --full-batch-size 30"
)


def write(path: Path, rows: int) -> Path:
    lines = (f"{text}\t{int(label == 'pos')}\n" for text, label in map(sentence, range(rows)))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def features(rows: int, width: int = 6) -> sst2_model.Features:
    """Rows whose first feature tells the label, and a start that is always wrong by a little."""
    labels = torch.arange(rows) % 2
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 3.0 * (2 * labels - 1)
    logits = 0.1 * torch.nn.functional.one_hot(1 - labels, 2).float()
    return sst2_model.Features(values, logits, labels)


def recipe(**changes: object) -> sst2_model.Recipe:
    return sst2_model.recipes.read(sst2_model.Recipe, "sst2-study", changes)


def test_opinions_say_what_their_label_says() -> None:
    made = opinions(400, seed=1)
    assert made == opinions(400, seed=1) != opinions(400, seed=2)
    assert sum(label for _, label in made) == 200
    assert not any(brace in text for text, _ in made for brace in "{}")
    assert not set(PRAISE) & set(BLAME)
    plain = [(text.split(), label) for text, label in made if text.startswith("the most ")]
    assert plain
    for words, label in plain:
        assert words[2] in (PRAISE if label else BLAME)


def test_features_are_those_of_the_row_alone(checkpoint: Build) -> None:
    folder = checkpoint("bert", "sequence-classification")
    model, tokenizer = load(str(folder), "sequence-classification", **classes(("0", "1")))
    rows = encode([Row(sentence(i)[0], i % 2, "") for i in range(7)], tokenizer, 12)
    together = sst2_model.read_features(model, rows, ([1, 2], [2]))
    assert together.values.shape == (7, 3 * model.config.hidden_size)
    assert together.labels.tolist() == [i % 2 for i in range(7)]
    for i in range(7):
        one = sst2_model.Rows(**{name: column[i : i + 1] for name, column in rows.columns.items()})
        alone = sst2_model.read_features(model, one, ([1, 2], [2]))
        torch.testing.assert_close(alone.values[0], together.values[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i])


def test_a_head_starts_as_the_public_start_and_learns() -> None:
    data = features(60)
    assert sst2_model.accuracy_of_start(data) == 0.0
    assert sst2_model.head_accuracy(sst2_model.Head(6, prior=0.5), data) == 0.0
    values = {"epochs": 30, "batch_size": 30, "prior": 0.5}
    head, public = sst2_model.train_head(data, recipe(**values), None, 1e-2)
    assert sst2_model.head_accuracy(head, data) == 1.0
    assert (public.steps, public.epsilon, public.noise_multiplier) == (60, None, None)
    torch.manual_seed(0)
    head, private = sst2_model.train_head(data, recipe(**values), 8.0, 1e-2)
    assert sst2_model.head_accuracy(head, data) > 0.9
    assert private.steps == 60
    assert private.epsilon == pytest.approx(8.0, rel=0.05)
    assert private.noise_multiplier is not None


def test_the_whole_command(
    checkpoint: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("bert", "sequence-classification")
    train, heldout = write(tmp_path / "train.tsv", 60), write(tmp_path / "dev.tsv", 20)
    out = tmp_path / "study"
    command = f"--data {train} --eval {heldout} --out {out} --model {folder} --seeds 2 {TINY}"
    options = [*command.split(), "--epsilons", "1"]
    assert sst2_study.main(options) == 0
    shown = capsys.readouterr().out
    assert "60 rows to train on, 20 held out, delta 1.67e-02" in shown
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    kinds = {run["kind"] for run in content["runs"].values()}
    assert kinds == {
        sst2_study.START,
        "head, epsilon 1",
        sst2_study.HEAD,
        sst2_study.FULL,
    }
    assert len(content["runs"]) == 8
    for run in content["runs"].values():
        assert 0 <= run["accuracy"] <= 1
        if run["kind"] == "head, epsilon 1":
            assert run["epsilon"] == pytest.approx(1.0, rel=0.05)
            assert run["steps"] == 8

    assert sst2_study.main(options) == 0  # nothing is left to do
    shown = capsys.readouterr().out
    assert "public start: step" not in shown
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == content
    assert sst2_study.main([*options, "--epochs", "5"]) == 2
    assert "is from other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epsilons 0", "--epsilons and --seeds want numbers above 0"),
        ("--mean-layers a", "mean_layers is 'a', wanted numbers by commas"),
        ("--mean-layers 9", "mean_layers and first_layers are 9 and 2, and the model has 2"),
        ("--averaged-share 2", "averaged_share is 2.0, wanted at most 1"),
        ("--delta 0.5", "--delta is 0.5, wanted a number above 0 and below 1 / 20"),
    ],
)
def test_errors_are_for_people(
    options: str,
    message: str,
    checkpoint: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint("bert", "sequence-classification")
    file = write(tmp_path / "train.tsv", 20)
    command = f"--data {file} --eval {file} --out {tmp_path / 'out'} --model {folder} {TINY}"
    assert sst2_study.main([*command.split(), *options.split()]) == 2
    assert message in capsys.readouterr().err
