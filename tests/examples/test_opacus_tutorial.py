"""The tutorial's loop, tiny: every trained parameter moves, no frozen one does, and the modes agree."""

import sys
from pathlib import Path

import pytest
import torch
from opacus import PrivacyEngine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # as when the script runs

import opacus_tutorial  # noqa: E402

import dpzoo  # noqa: E402

TOP = ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of sentences, as SNLI has them."""
    texts = ("a horse jumps over a fence", "two children laugh", "nobody is there", "it rains")
    labels = ("contradiction", "entailment", "neutral")
    lines = [f"{texts[i % 4]}\t{texts[i % 3]} {i % 5}\t{labels[i % 3]}" for i in range(60)]
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("trained", ["top", "all"])
def test_both_modes_take_the_same_steps(
    trained: str,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With equal seeds, so are the batches and the noise; what is left is rounding."""
    # The default accountant takes seconds to find a noise multiplier.
    monkeypatch.setattr(opacus_tutorial, "PrivacyEngine", lambda: PrivacyEngine(accountant="rdp"))
    weights = {}
    for mode in ("hooks", "ghost"):
        model, accuracy, epsilon = opacus_tutorial.main(
            ["--tiny", "--mode", mode, "--train", trained, "--data", str(pairs), "--epochs", "2"]
        )
        assert isinstance(model, dpzoo.BertForSequenceClassification)
        assert 0 <= accuracy <= 1
        assert 0 < epsilon <= 7.5
        weights[mode] = model.state_dict()
    assert capsys.readouterr().out.count("epsilon") == 4  # two epochs, two modes

    torch.manual_seed(0)
    labels = ["contradiction", "entailment", "neutral"]
    arguments = opacus_tutorial.argparse.Namespace(tiny=True)
    start = opacus_tutorial.build_model(arguments, labels).state_dict()
    for key, value in start.items():
        moves = trained == "all" or key.startswith(TOP)
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
        opacus_tutorial.main(["--tiny", "--data", str(path)])
