"""`dpzoo bench`: what is run, in which order, and what is made of the times."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dpzoo
from dpzoo.bench import BASELINE, MODES, BenchReport, Measurement, Workload, bench
from dpzoo.bench import memory as memory_module
from dpzoo.bench import timing as timing_module
from dpzoo.bench.profiling import profile
from dpzoo.bench.runner import pieces
from dpzoo.bench.timing import ratio_to
from dpzoo.bench.workload import Step
from dpzoo.cli import main
from dpzoo.errors import InputError
from tests.support import stock_model

CLASSIFIER = "BertForSequenceClassification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint")
    dpzoo.convert(stock_model(CLASSIFIER).float()).save_pretrained(path)
    return str(path)


@pytest.fixture
def workload(folder: str) -> Workload:
    return Workload(folder, batch=3, seq=7)


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_a_step(workload: Workload, mode: str) -> None:
    if mode == "ew":
        with pytest.raises(TypeError, match="positional argument"):
            Step(workload, mode)("step")
        return
    step = Step(workload, mode)
    for setting in ("gradient", "step", "amortized"):
        step(setting, every=2)
    gradients = [p.grad for p in step.optimizer.param_groups[0]["params"]]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert step.private == (mode not in (BASELINE, "stock"))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_noise_is_in_the_step_and_not_in_the_gradient_half(workload: Workload, mode: str) -> None:
    step = Step(workload, mode)

    def gradient(setting: str) -> torch.Tensor:
        step(setting, every=2)
        return torch.cat([p.grad.flatten() for p in step.optimizer.params])  # type: ignore[attr-defined]

    quiet, again, noisy, amortized = map(gradient, ("gradient", "gradient", "step", "amortized"))
    torch.testing.assert_close(quiet, again, rtol=1e-4, atol=1e-6)
    for noised in (noisy, amortized):
        # sigma C / batch, and the amortized sum has at most twice the signal
        assert float((noised - quiet).std()) == pytest.approx(1 / 3, rel=0.2)


def test_amortized_draws_noise_once(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(workload, "bk")
    drawn: list[float] = []
    monkeypatch.setattr(
        step.optimizer, "_noise_in_place", lambda grads, std, scale: drawn.append(std), raising=True
    )
    step("amortized", every=4)
    assert drawn == [1.0]


def test_all_modes_train_the_same_model_on_the_same_batch(workload: Workload) -> None:
    steps = [Step(workload, mode) for mode in (BASELINE, "stock", "bk")]
    first = steps[0]
    for other in steps[1:]:
        for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(first.batch[key], other.batch[key]) for key in first.batch)
    assert bool((first.batch["attention_mask"] == 1).all())
    assert first.batch["input_ids"].shape == (3, 7)


def test_lora_trains_adapters_alone(workload: Workload) -> None:
    lora = dataclasses.replace(workload, lora=2)
    step = Step(lora, "bk")
    trained = [n for n, p in step.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or "classifier" in name for name in trained)
    step("step")
    with pytest.raises(InputError, match="Mode 'stock' got lora"):
        Step(lora, "stock")


def test_presets_have_the_sizes_of_their_names() -> None:
    with torch.device("meta"):
        model = Workload("distilbert-base", layers=1, seq=700)._preset()
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (768, 1)
    assert model.config.max_position_embeddings == 702
    with torch.device("meta"):
        model = Workload("GPT2ForTokenClassification", layers=2)._preset()
    assert type(model).__name__ == "GPT2ForTokenClassification"
    assert model.config.n_layer == 2


def test_layers_of_a_checkpoint_are_refused(folder: str) -> None:
    with pytest.raises(InputError, match="layers=2 goes with a preset, got the checkpoint"):
        Workload(folder, layers=2).build_model()


# --- times and memory -------------------------------------------------------------------------------


def test_modes_run_in_turns(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    class Fake:
        def __init__(self, workload: Workload, mode: str) -> None:
            self.mode = mode

        def __call__(self, setting: str, every: int) -> None:
            ran.append((self.mode, setting))

    monkeypatch.setattr(timing_module, "Step", Fake)
    times = timing_module.time_modes(
        workload, ["a", "b"], ["step"], steps=2, warmup=1, every=1, progress=lambda _: None
    )
    assert ran == [("a", "step"), ("b", "step")] * 3
    assert {mode: len(found["step"]) for mode, found in times.items()} == {"a": 2, "b": 2}


def test_amortized_times_are_those_of_one_physical_batch(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[float] = iter([0.0, 8.0])
    monkeypatch.setattr(timing_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing_module, "Step", lambda workload, mode: lambda setting, every: None)
    times = timing_module.time_modes(
        workload, ["a"], ["amortized"], steps=1, warmup=0, every=4, progress=lambda _: None
    )
    assert times == {"a": {"amortized": [2.0]}}


def test_a_ratio_is_the_median_over_pairs() -> None:
    # The machine was twice as slow for one pair: its ratio is like the others'.
    assert ratio_to([2.0, 4.0, 2.2], [1.0, 2.0, 1.0]) == 2.0


@pytest.mark.slow
def test_memory_is_measured_in_a_new_process(workload: Workload) -> None:
    peak = memory_module._in_a_new_process(workload, "bk")
    assert peak.peak > peak.before > 50 * 2**20
    assert 0 < peak.within < 500 * 2**20
    with pytest.raises(memory_module.MeasurementError, match="'ew' was not measured: TypeError"):
        memory_module._in_a_new_process(workload, "ew")


def test_the_peak_in_the_middle_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([memory_module.Peak(1, 9), memory_module.Peak(5, 6), memory_module.Peak(0, 4)])
    monkeypatch.setattr(memory_module, "_in_a_new_process", lambda workload, mode: next(found))
    assert memory_module.measure(Workload("x"), "bk") == memory_module.Peak(0, 4)


# --- the report -------------------------------------------------------------------------------------


def test_a_report_of_modes_that_run_and_one_that_does_not(workload: Workload) -> None:
    said: list[str] = []
    report = bench(
        [workload],
        modes=["bk", "ew"],
        processes=0,
        steps=2,
        warmup=1,
        every=2,
        progress=said.append,
    )
    by_mode = {m.mode: m for m in report.measurements}
    assert list(by_mode) == [BASELINE, "bk", "ew"]
    assert by_mode[BASELINE].ratios == {"gradient": 1.0, "step": 1.0, "amortized": 1.0}
    assert set(by_mode["bk"].ratios) == {"gradient", "step", "amortized"}
    assert all(value > 0 for value in by_mode["bk"].ratios.values())
    assert "positional" in (by_mode["ew"].error or "")
    assert "ew cannot run: " in report.notes()[0]
    assert report.rows()[3][:4] == ["3 x 7", "ew", "cannot run", "-"]
    assert report.rows()[0][4] == "amortized over 2"
    # Of the three modes one did not get beyond its trial.
    assert len(said) == pieces(1, 2, 3, processes=0, steps=2, warmup=1) + 1
    assert json.loads(json.dumps(report.to_dict()))["every"] == 2
    assert report.versions["device"].startswith("CPU")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["fast"]}, "Got the mode 'fast', wanted of non-private, stock, hooks"),
        ({"settings": ["half"]}, "Got the setting 'half', wanted of gradient, step, amortized"),
        ({"steps": 0}, "Got steps=0, warmup=2, every=8, processes=3, wanted"),
    ],
)
def test_refusals(workload: Workload, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench([workload], **options)


def report_of(*shapes: tuple[int, int]) -> BenchReport:
    found = [
        Measurement(
            Workload("x", batch=batch, seq=seq),
            mode,
            {"step": 1.0},
            {"step": ratio, "memory": ratio},
            2**20,
            2**21,
        )
        for batch, seq in shapes
        for mode, ratio in ((BASELINE, 1.0), ("bk", 1.2))
    ]
    return BenchReport(tuple(found), 8, {})


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "growth.svg"
    report_of((8, 32), (8, 64), (8, 128), (1, 128), (4, 128)).plot(path)
    drawn = path.read_text(encoding="utf-8")
    assert drawn.count('id="axes_') == 4  # time and memory, over seq and over batch
    with pytest.raises(InputError, match="nothing to plot"):
        report_of((8, 32), (4, 64)).plot(path)


def test_profile(workload: Workload) -> None:
    text = profile(workload, [BASELINE, "bk"])
    assert "non-private, 3 x 7" in text
    assert "aten::addmm" in text


# --- the command ------------------------------------------------------------------------------------


def test_command(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot, table = tmp_path / "growth.png", tmp_path / "profile.txt"
    arguments = [
        "bench",
        folder,
        "--batch",
        "2,3",
        "--seq",
        "5",
        "--modes",
        "bk",
        "--processes",
        "0",
    ]
    arguments += ["--steps", "1", "--warmup", "0", "--every", "2"]
    assert main([*arguments, "--plot", str(plot), "--profile", str(table)]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines()[2:]] == [
        ["2", "x", "5"],
        ["2", "x", "5"],
        ["3", "x", "5"],
        ["3", "x", "5"],
    ]
    assert plot.stat().st_size > 10_000
    assert "aten::" in table.read_text()

    assert main([*arguments, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measurements"]
    assert [(m["workload"]["batch"], m["mode"]) for m in measured] == [
        (2, BASELINE),
        (2, "bk"),
        (3, BASELINE),
        (3, "bk"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch got '0', wanted whole numbers above 0"),
        (["--shapes", "8"], "--shapes got '', wanted whole numbers above 0"),
        (["--modes", "fast"], "Got the mode 'fast'"),
    ],
)
def test_command_refuses(
    folder: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", folder, *arguments]) == 2
    assert message in capsys.readouterr().err
