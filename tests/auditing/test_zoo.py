"""The zoo passes; the report of each stock counterpart names its real defects."""

import pytest
import torch

import dpzoo
from dpzoo.auditing import AuditReport, audit
from tests.support import FAMILY, NAMES, TASK, TIED, batch_for, stock_model

A_FEW = [
    "BertForSequenceClassification",
    "BertForPreTraining",
    "DistilBertForTokenClassification",
    "GPT2DoubleHeadsModel",
    "GPT2LMHeadModel",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
]
SAMPLED = [name if name in A_FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
TABLES = {
    "bert": "bert.embeddings.position_embeddings",
    "distilbert": "distilbert.embeddings.position_embeddings",
    "gpt2": "transformer.wpe",
}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_class_of_the_zoo_passes_every_check(name: str) -> None:
    report = audit(dpzoo.convert(stock_model(name, dtype=torch.float32)), batch_for(name))
    assert report.ok, str(report)
    assert not any(result.skipped for result in report), str(report)
    notes = {f.message.split(";")[0] for f in report.findings}
    assert notes <= {
        "one parameter under 2 names",
        "Opacus adds a row whose gradient is NaN or Inf to the sum, and all weights become NaN",
    }
    assert ("one parameter under 2 names" in notes) == (name in TIED)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_other_modes_pass_too(name: str) -> None:
    """functorch, and ew where torch's ExpandedWeights take the class."""
    model, batch = dpzoo.convert(stock_model(name, dtype=torch.float32)), batch_for(name)
    report = audit(model, batch, modes=("functorch", "ew"))
    assert report.ok, str(report)
    assert {result.name: result.skipped for result in report if result.skipped} == {
        "edge_cases": "ew: torch's ExpandedWeights refuse empty batches",
        "stale_state": "only ghost mode keeps norms from one batch to the next",
        "noise": "ew: as hooks",  # one optimizer draws it in all of these modes
    }, str(report)


def _says(report: AuditReport, check: str, message: str) -> list[str]:
    """Parameters and modules of a check's findings with a message."""
    found = [f for f in report[check].findings if message in f.message]
    return [name for f in found for name in (*f.parameters, *f.modules)] + ["found"] * bool(found)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_stock_class_is_named_for_its_defects(name: str) -> None:
    report = audit(stock_model(name, dtype=torch.float32), batch_for(name))
    family, task = FAMILY[name], TASK[name]
    assert not report.ok
    if family in TABLES:
        table = TABLES[family].partition(".")[2] if task == "base" else TABLES[family]
        if task == "multiple-choice" and family == "distilbert":
            table = "distilbert.embeddings.position_embeddings"
        assert table in _says(report, "coverage", "one input for the whole batch"), str(report)
    if name in TIED:
        # transformers divides by the labelled tokens of the batch
        assert _says(report, "isolation", "not the mean of the rows' losses"), str(report)
    if task == "token-classification":
        assert _says(report, "isolation", "not the mean of the rows' losses"), str(report)
    if name == "GPT2LMHeadModel":
        tying = _says(report, "coverage", "Parameter tying is not supported")
        assert {"transformer.wte.weight", "lm_head.weight"} <= set(tying)
    if task in ("multiple-choice", "double-heads"):
        assert _says(report, "privacy_unit", "a multiple of the number of rows"), str(report)
