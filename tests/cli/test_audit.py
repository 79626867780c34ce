"""``dpzoo audit``, where its arguments are wrong; what it finds is tested in tests/auditing."""

import json
from pathlib import Path

import pytest
import torch

from dpzoo.cli import main
from tests.support import stock_model


def test_a_source_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    stock_model("BertModel", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["audit", str(tmp_path), "--task", "masked-lm"]) == 2
    assert "its config.json has no model_type" in capsys.readouterr().err
