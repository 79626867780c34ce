"""The tutorial's loop, tiny: every trained parameter moves, no frozen one does, and the modes agree."""

from collections.abc import Callable
from pathlib import Path

import opacus_tutorial
import pytest
import torch

import dpzoo

TOP = ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")
LABELS = ["contradiction", "entailment", "neutral"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of sentences, as SNLI has them."""
    texts = ("the film was good", "the plot was bad", "great", "very poor")
    lines = [f"{texts[i % 4]}\t{texts[i % 3]}{i % 5 * ' very'}\t{LABELS[i % 3]}" for i in range(60)]
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.usefixtures("quick_accountant")
@pytest.mark.parametrize("trained", ["top", "all"])
def test_both_modes_take_the_same_steps(
    trained: str,
    pairs: Path,
    checkpoint: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With equal seeds, so are the batches and the noise; what is left is rounding."""
    folder, weights = str(checkpoint("bert", "masked-lm")), {}
    options = f"--model {folder} --train {trained} --data {pairs} --epochs 2 --max-length 16"
    for mode in ("hooks", "ghost"):
        model, epsilon = opacus_tutorial.main([*options.split(), "--mode", mode])
        assert isinstance(model, dpzoo.BertForSequenceClassification)
        assert 0 < epsilon <= 7.5
        weights[mode] = model.state_dict()
    assert capsys.readouterr().out.count("epsilon") == 4  # two epochs, two modes

    torch.manual_seed(0)
    start = opacus_tutorial.build_model(folder, LABELS, trained).state_dict()
    for key, value in start.items():
        moves = trained == "all" or key.startswith(TOP)
        if not key.startswith(TOP[1:]):  # the head is new, and its first weights are another draw's
            assert torch.equal(weights["hooks"][key], value) != moves, key
        torch.testing.assert_close(weights["ghost"][key], weights["hooks"][key], rtol=0, atol=1e-4)


def test_the_default_data_are_the_quickstarts() -> None:
    train, test = opacus_tutorial.read_rows(None)
    assert len(train) > len(test) > 100
    assert {label for _, label in test} <= {label for _, label in train}


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.tsv"
    path.write_text("one column only\n" * 20, encoding="utf-8")
    with pytest.raises(SystemExit, match="wanted ten lines or more of text<TAB>"):
        opacus_tutorial.main(["--data", str(path)])
