"""The quickstart: a small run of the whole script, and that it can be read at one sitting."""

from collections.abc import Callable
from pathlib import Path

import pytest
import quickstart
from transformers import BertConfig, BertModel, pipeline

from tests.examples.conftest import ROOT


@pytest.mark.usefixtures("quick_accountant")
def test_the_whole_script(
    checkpoint: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = checkpoint("bert", "sequence-classification"), tmp_path / "out"
    config = BertConfig.from_pretrained(model, max_position_embeddings=48, num_labels=2)
    BertModel(config).save_pretrained(model)  # without a head, as encoders are
    assert quickstart.main(f"--rows 20 --epsilon 3 --model {model} --out {out}".split()) == 0
    shown = capsys.readouterr().out
    for part in (
        "120 sentences to train on",
        "% with privacy, ",
        "% by always guessing one area",
        "at delta 4.2e-03",
        "times the clipping norm, in each of 100 steps",
        "in a step with probability 0.50",
        f'pipeline("text-classification", "{out}")',
    ):
        assert part in shown
    epsilon = float(shown.split("privacy   epsilon ")[1].split()[0])
    assert 2.5 < epsilon <= 3
    answer = shown.rstrip().splitlines()[-1].split("-> ")[1]
    assert answer in pipeline("text-classification", str(out)).model.config.label2id


def test_the_examples_are_few_and_short() -> None:
    """Twelve scripts, each to be read alone; what they share is in support/."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) <= 12
    for path in scripts:
        lines = path.read_text(encoding="utf-8").splitlines()
        limit = {"quickstart": 80}.get(path.stem, 120)
        assert len(lines) < limit, path.name
