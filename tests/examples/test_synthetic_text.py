"""The study that writes a data set: a decoder of its own, and one that is given."""

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_text


@pytest.mark.parametrize("own", [True, False])
def test_it_writes_a_data_set(
    own: bool,
    checkpoint: Callable[[str, str], Path],
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder, out = checkpoint("bert", "sequence-classification"), tmp_path / "made"
    options = (
        f"--data {reviews} --eval {reviews} --out {out} --encoder {encoder} --epochs 1".split()
    )
    options += [
        "--batch-size",
        "16",
        "--count",
        "4",
        "--length",
        "6",
        "--width",
        "8",
        "--layers",
        "1",
    ]
    if not own:
        options += ["--model", str(checkpoint("gpt2", "causal-lm"))]
    assert synthetic_text.main(options) == 0
    said = capsys.readouterr().out
    assert "epsilon 7.9" in said or "epsilon 8.0" in said
    assert "the real rows, not private" in said
    lines = (out / "synthetic.tsv").read_text(encoding="utf-8").splitlines()
    assert 1 < len(lines) <= 9
    assert (out / "decoder" / "privacy.json").is_file()
