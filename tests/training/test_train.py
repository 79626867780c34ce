"""`dpzoo.train` and ``dpzoo train`` on tiny models from scratch: choices, plan, card, resuming."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForSequenceClassification, pipeline

import dpzoo
from dpzoo.accounting import epsilon_of
from dpzoo.cli import main
from dpzoo.empirical.one_run import ASSUMES, Bound
from dpzoo.errors import InputError
from dpzoo.heads import output_layer
from dpzoo.training import Recipe
from dpzoo.training import gradient_route as module
from dpzoo.training.data import Task
from dpzoo.training.job import Job
from dpzoo.training.models import load
from dpzoo.training.recipe import choose
from tests.support import others_slow


@pytest.fixture(autouse=True)
def quiet() -> Any:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "np"[i % 2]} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "gpt2.json").write_text(json.dumps(GPT2))
    (tmp_path / "bert.json").write_text(json.dumps(BERT))
    return tmp_path


QUICK = {"epochs": 1, "batch_size": 16, "epsilon": 3.0}  # one search for the noise, five steps


def recipe(folder: Path, config: str = "gpt2", **options: Any) -> dict[str, Any]:
    settings = {"data": str(folder / "rows.jsonl"), "model": str(folder / f"{config}.json")}
    return {**settings, "out": str(folder / "out"), **QUICK, **options}


@pytest.mark.parametrize("trainable", ["head", "lora", "bias", "all"])
def test_a_classifier(trainable: str, folder: Path) -> None:
    said: list[str] = []
    # GPT-2's classes are read off the last token, of which a head alone makes nothing here.
    model = "bert" if trainable == "head" else "gpt2"
    run = dpzoo.train(recipe(folder, model, trainable=trainable), say=said.append)
    assert run.card is not None
    assert 2.5 < run.card.epsilon <= 3.0
    assert run.card.delta == 1 / run.plan.units
    assert run.card.steps == run.plan.steps
    assert run.card.noise_multiplier == pytest.approx(run.plan.noise_multiplier)
    assert run.metrics is not None
    assert 0 <= run.metrics["accuracy"] <= 1
    out = folder / "out"
    saved = json.loads((out / "privacy.json").read_text())
    assert saved["epsilon"] == run.card.epsilon
    assert "Set by hand: epochs, batch_size, trainable" in saved["tuned"]
    assert "## Privacy" in (out / "README.md").read_text()
    for path in out.rglob("*"):
        assert "not_private" not in path.name
        assert path.name not in (
            "trainer_state.json",
            "training_args.bin",
            "privacy_random_state.pt",
        )
    assert pipeline("text-classification", str(out))("good 3")[0]["label"] in ("n", "p")
    stock = AutoModelForSequenceClassification.from_pretrained(out)
    assert stock.config.id2label == {0: "n", 1: "p"}
    assert (out / "adapter" / "adapter_config.json").exists() == (trainable == "lora")
    text = "\n".join(said)
    for line in (
        "task      classification: column 'label' has 2 classes",
        "not covered by epsilon",
    ):
        assert line in text
    assert any(line.startswith("step") and "(not private)" in line for line in said)
    work = folder / "out.run"
    assert work.exists() == (trainable != "head")
    if work.exists():
        header, first, *_ = (work / "log_not_private.csv").read_text().splitlines()
        assert header == "step,loss,learning_rate,epsilon"
        assert first.startswith("1,")


def test_what_is_trained_moves_and_the_rest_stays(folder: Path) -> None:
    torch.manual_seed(0)
    dpzoo.train(recipe(folder, trainable="bias"))
    transformers.set_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder / "gpt2.json", num_labels=2)
    config.vocab_size, config.pad_token_id = 259, 0
    start = AutoModelForSequenceClassification.from_config(config)
    end = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    head = {id(p) for p in output_layer(end)[1].parameters()}
    weights = start.state_dict()
    for name, parameter in end.named_parameters():
        moved = not torch.equal(parameter, weights[name])
        assert moved == (name.endswith("bias") or id(parameter) in head), name


def test_a_language_model_of_prompts_and_answers(folder: Path) -> None:
    lines = [f'"name[{i}], food[{"tea" if i % 2 else "pie"}]","we eat {i}"' for i in range(60)]
    (folder / "pairs.csv").write_text("mr,ref\n" + "\n".join(lines) + "\n")
    said: list[str] = []
    told = recipe(folder, data=str(folder / "pairs.csv"), learning_rate=0.02, epochs=4)
    run = dpzoo.train({**told, "statistics": True}, say=said.append)
    assert run.metrics is not None
    assert run.metrics["loss"] < run.metrics["loss before training"]
    assert any(
        line.startswith("trained   all: the model begins from random weights") for line in said
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer("ab")["input_ids"][:2] == [ord("a") + 3, ord("b") + 3]
    transformers.GPT2LMHeadModel.from_pretrained(folder / "out")
    assert (folder / "out.run" / "statistics_not_private.jsonl").exists()
    assert (folder / "out.run" / "statistics_not_private.png").exists()


def test_labels_are_those_of_the_answer(folder: Path) -> None:
    (folder / "pairs.csv").write_text(
        "prompt,completion\nab,cde\n" + "".join(f"x{i},y{i}\n" for i in range(40))
    )
    job = Job(Recipe.of(recipe(folder, data=str(folder / "pairs.csv"))), {}, lambda line: None)
    table = module.Table({"prompt": ["ab", "p" * 99], "completion": ["cde", "q" * 99]})
    short, long = module.encode(job, table)
    a, end = ord("a") + 3, job.tokenizer.eos_token_id
    assert short["input_ids"] == [a, a + 1, end, a + 2, a + 3, a + 4, end]
    assert short["labels"] == [-100] * 3 + short["input_ids"][3:]
    assert len(long["input_ids"]) == 64 == len(long["attention_mask"])
    assert sum(label != -100 for label in long["labels"]) == 32  # the answer keeps half


def test_a_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    options = ["--model", str(folder / "gpt2.json"), "--out", str(folder / "out"), "--epsilon", "2"]
    assert main(["train", str(folder / "rows.jsonl"), *options, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in (
        "privacy   epsilon 2 at delta",
        "noise     multiplier",
        "signal    at most",
        "time ",
    ):
        assert part in told
    assert told.endswith("nothing was trained (dry run)\n")
    assert sorted(folder.rglob("*")) == before


def test_a_killed_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    told = recipe(folder, trainable="all", epochs=2, physical_batch_size=500, lora_rank=8, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(module._ProgressLog, "on_step_end", killed, raising=False)
        with pytest.raises(KeyboardInterrupt):
            dpzoo.train(told)
    assert not (folder / "out").exists()
    with pytest.raises(dpzoo.InputError, match=r"that was not finished \(checkpoint-2\)"):
        dpzoo.train(told)
    with pytest.raises(
        dpzoo.InputError, match=r"resumed with {'epochs': 9.0}, and .* {'epochs': 2.0}"
    ):
        dpzoo.train({**told, "epochs": 9}, resume=True)
    # A default that was written is a value as any other.
    for name, value in {"epsilon": 8, "lora_rank": 4, "seed": 7, "heldout_share": 0.2}.items():
        with pytest.raises(
            dpzoo.InputError, match=f"resumed with {{'{name}': .*, and it was begun with"
        ):
            dpzoo.train({**told, name: value}, resume=True)
    options = ["--out", told["out"], "--resume", "--epsilon", "8"]
    assert main(["train", told["data"], *options]) == 2
    said = "resumed with {'epsilon': 8.0}, and it was begun with {'epsilon': 3.0}"
    assert said in capsys.readouterr().err
    saved = (folder / "out.run" / "recipe.json").read_text()
    for damaged in (
        saved[:-9],
        saved.replace('"recipe"', '"other"'),
        saved.replace("3.0", '"much"'),
    ):
        (folder / "out.run" / "recipe.json").write_text(damaged)
        with pytest.raises(
            dpzoo.InputError, match=r"recipe.json is damaged \(.*\), so it is not known"
        ):
            dpzoo.train(told, resume=True)
    (folder / "out.run" / "recipe.json").write_text(saved)
    # What was chosen in the place of what was written is no change of it.
    assert json.loads(saved)["recipe"]["physical_batch_size"] < 500
    run = dpzoo.train(told, resume=True)
    assert run.card is not None
    assert run.card.steps == run.plan.steps == 2 * -(-run.plan.units // 16)
    assert run.card.epsilon <= 3.0  # the step that was done again is the same one
    assert "Set by hand: epochs, batch_size, trainable" in str(run.card.tuned)
    with pytest.raises(dpzoo.InputError, match=r"out is not empty. Name another with out"):
        dpzoo.train(told, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "user"}, "There is no column 'user'; there are"),
        ({"unit": "text", "trainable": "head"}, "trainable='head' got unit='text', wanted none"),
        ({"max_rows_per_unit": 2}, "max_rows_per_unit came without unit, wanted both or none"),
        ({"trainable": "some"}, "trainable='some', wanted one of"),
        ({"epsilon": 0.0}, "epsilon=0.0, wanted a number above 0"),
        ({"heldout_share": 0.9}, "heldout_share=0.9, wanted above 0, at most 0.5"),
        ({"epochs": "many"}, "The recipe has epochs='many', wanted float"),
        ({"batch_size": 1.5}, "The recipe has batch_size=1.5, wanted int"),
        ({"colour": "red"}, r"unknown keys \['colour'\], wanted data and any of"),
        ({"delta": 0.5}, r"target_delta=0.5 for \d+ rows, wanted at most"),
        (
            {"model": "not/there.json"},
            "There is no file not/there.json. Name the path of a config.json",
        ),
        ({"max_length": 3}, "max_length=3, wanted at least 4 tokens"),
        (
            {"lora_rank": 17, "trainable": "lora"},
            "lora_rank=17, wanted at most the model's width, 16",
        ),
        (
            {"epsilon": 201},
            r"epsilon 201 at .* by Opacus' accountant prv, is not searched for, wanted",
        ),
        (
            {"delta": 1e-300},
            r"No noise is found for epsilon 3 at delta 1e-300 after 5 steps .*: Floating",
        ),
        (
            {"epochs": 1e9},
            "No noise is found for epsilon 3 at .* after 5,000,000,000 steps of sample",
        ),
        (
            {"epsilon": 1e-9, "delta": 1e-6},
            "No noise is found for epsilon 1e-09 .*: The privacy budget is too low. Wan",
        ),
        ({"seed": -1}, "seed=-1, wanted a whole number from 0, below"),
        ({"seed": 2**32}, "seed=4294967296, wanted a whole number"),
        ({"out": " "}, "out=' ', wanted the name of a folder"),
        (
            {"canaries": 10**12},
            r"canaries=1000000000000 for \d+ rows to train on, wanted at most as",
        ),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(dpzoo.InputError, match=message):
        dpzoo.train(recipe(folder, **options))


def test_the_unit_may_be_whose_a_row_is(folder: Path) -> None:
    rows = [
        {"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "np"[i % 2], "user": f"u{i % 40}"}
        for i in range(160)
    ]
    (folder / "owned.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = recipe(folder, data=str(folder / "owned.jsonl"), unit="user", label="label", text="text")
    said: list[str] = []
    run = dpzoo.train({**told, "trainable": "bias", "max_rows_per_unit": 3}, say=said.append)
    assert run.card is not None
    assert 20 < run.card.units < 40
    assert run.card.delta == 1 / run.card.units
    assert run.card.unit == "all rows of the training data of one 'user'"
    assert run.plan.units == run.card.units
    split = next(line for line in said if line.startswith("split"))
    held_out = int(split.split(", ")[1].split()[0])
    assert held_out == 4 * (40 - run.card.units)  # whole users


def test_an_encoder_is_no_language_model(folder: Path) -> None:
    told = recipe(folder, "bert", task="language-modelling", text="text")
    with pytest.raises(
        dpzoo.InputError, match=r"bert.json is a bert, .* wanted a decoder such as GPT-2"
    ):
        dpzoo.train(told)
    with pytest.raises(dpzoo.InputError, match="trainable='head' is for classification"):
        dpzoo.train(recipe(folder, task="language-modelling", text="text", trainable="head"))


def test_a_recipe_file_and_options_over_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{key}: {value}" for key, value in recipe(folder).items() if key != "epsilon"]
    (folder / "run.yaml").write_text("\n".join([*lines, "learning_rate: 1e-3", "epsilon: 5"]))
    assert Recipe.of(folder / "run.yaml").learning_rate == 1e-3
    assert main(["train", str(folder / "run.yaml"), "--epsilon", "2", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "epsilon 2 at" in told
    assert "learning rate 0.001" in told
    for text, message in (
        ("- a\n", "has no `key: value` lines"),
        ("data: a.tsv\nepsilon: 1\nepsilon: 9\n", "has epsilon more than once, wanted one value"),
        (
            "data: [a\n",
            r"cannot be read as YAML in UTF-8: while parsing a flow sequence in .* line 2",
        ),
        ("data: " + "[" * 3000, "cannot be read as YAML in UTF-8: "),
        ("data: caf\udce9\n", "cannot be read as YAML in UTF-8: 'utf-8' codec can't decode"),
        ("data: a.tsv\nout: null\n", "has out=None, wanted str"),
        ("data: a.tsv\nepsilon: null\n", "has epsilon=None, wanted float"),
        ("data: a.tsv\nlabels: [no, yes]\n", r"has labels=\[False, True\], wanted str"),
        ("data: a.tsv\nlabel: no\n", "has label=False, wanted str"),
        ("data: a.tsv\nheader: perhaps\n", "has header='perhaps', wanted bool"),
        ("data: a.tsv\ncanaries: .inf\n", "has canaries=inf, wanted int"),
        ("data: a.tsv\nepsilon: .nan\n", "epsilon=nan, wanted a number above 0"),
        ("data: a.tsv\nepochs: yes\n", "has epochs=True, wanted float"),
        ("1: 2\ndata: a.tsv\n", r"has unknown keys \['1'\], wanted data and any of"),
    ):
        (folder / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(dpzoo.InputError, match=message):
            Recipe.of(folder / "bad.yaml")
    with pytest.raises(dpzoo.InputError, match="has epsilon='8 or so', wanted float"):
        Recipe("a.tsv", epsilon="8 or so")  # type: ignore[arg-type]
    assert main(["train", str(folder / "gone.csv")]) == 2


@pytest.mark.parametrize(
    ("rows", "parameters", "chosen"),
    [
        (3_000, 22_700_000, "head"),
        (67_349, 22_700_000, "head"),
        (10**6, 22_700_000, "all"),
        (10**6, 10**10, "lora"),
    ],
)
def test_what_is_trained_follows_rows_and_parameters(
    rows: int, parameters: int, chosen: str
) -> None:
    trainable, why = choose("classification", rows, parameters, 8.0, 1 / rows, scratch=False)
    assert trainable == chosen
    assert (
        f"of all {parameters:,} parameters, {rows:,} rows at epsilon 8 would give a signal" in why
    )


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs" / "train").iterdir())
)
def test_the_recipes_are_read(path: Path) -> None:
    told = Recipe.of(path)
    assert path.stem.endswith(str(told.trainable))
    assert told.given().keys() >= {"eval", "model", "epochs", "batch_size", "learning_rate"}


# --- texts of nothing ---------------------------------------------------------------------------


def checkpoint(folder: Path, cls: Any) -> str:
    """A GPT-2 with a tokenizer that makes no token of the empty text, as its published one."""
    marks = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {mark: i for i, mark in enumerate([*marks, "<|endoftext|>"])}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocabulary, merges=[])
    assert tokenizer("")["input_ids"] == []
    config = transformers.GPT2Config(**GPT2, vocab_size=len(vocabulary))
    config.eos_token_id = config.bos_token_id = config.pad_token_id = len(marks)
    torch.manual_seed(0)
    cls(config).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return str(folder / "checkpoint")


@pytest.mark.parametrize("trainable", others_slow(["head", "bias", "all"], ["all"]))
def test_some_texts_may_be_empty_the_first_too(trainable: str, folder: Path) -> None:
    rows = [{"text": "" if i < 60 else f"row {i}", "label": "np"[i % 2]} for i in range(80)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = checkpoint(folder, transformers.GPT2ForSequenceClassification)
    run = dpzoo.train(recipe(folder, trainable=trainable, model=name, canaries=4, seed=1))
    assert run.metrics is not None
    assert 0 <= run.metrics["accuracy"] <= 1


def test_empty_texts_of_a_language_model(folder: Path) -> None:
    rows = [{"text": "" if i < 60 else f"row {i}"} for i in range(80)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = checkpoint(folder, transformers.GPT2LMHeadModel)
    run = dpzoo.train(recipe(folder, model=name, trainable="all", canaries=4))
    assert run.metrics is not None
    assert 0 < run.metrics["loss"] < 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": " "}] * 9, "'text' is blank in all 9 rows|too few rows to hold some out"),
        ([{"text": " " * i} for i in range(1, 40)], r"Column 'text' is blank in all \d+ rows, wanted"),
        ([{"text": "same"}] * 9, "has too few rows to hold some out"),
        ([{"text": "a"}], "has fewer than 2 rows: no batch hides one row"),
        ([{"text": "a"}, {"text": "b"}], "has too few rows to hold some out"),
    ],
)  # fmt: skip
def test_rows_that_say_nothing(rows: list[Any], message: str, folder: Path) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(dpzoo.InputError, match=message):
        dpzoo.train(recipe(folder))


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.jsonl/out", "loop", "x" * 300, "taken"])
def test_a_folder_that_cannot_be_written_is_named_before_the_training(
    out: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "taken.run").write_text("a file")
    monkeypatch.setattr(module.GradientRoute, "train", lambda *_: pytest.fail("trained"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(dpzoo.InputError, match="is no folder that can be written"):
        dpzoo.train(recipe(folder, out=str(folder / out)))
    assert sorted(folder.rglob("*")) == before


def test_every_row_needs_an_owner(folder: Path) -> None:
    rows = [{"text": f"row {i}", "user": None if i == 7 else f"u{i}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = recipe(folder, unit="user", text="text", task="language-modelling", seed=1)
    with pytest.raises(
        dpzoo.InputError, match=r"Row \d+ .* has nothing in column 'user', wanted whose"
    ):
        dpzoo.train(told)


def test_all_texts_may_be_equal_and_a_class_may_be_missing_among_the_rows(folder: Path) -> None:
    """Rows of one text are learned as any others; the majority's accuracy is what there is to say."""
    rows = [{"text": "same", "label": "np"[i % 2]} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "eval.jsonl").write_text(json.dumps(rows[0]))
    told = recipe(folder, "bert", trainable="head", eval=str(folder / "eval.jsonl"))
    run = dpzoo.train({**told, "labels": "n,p,q"})
    assert run.metrics is not None
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    assert stock.config.id2label == {0: "n", 1: "p", 2: "q"}


# --- canaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", others_slow(["head", "lora", "bias", "all"], ["head"]))
def test_canaries_bound_epsilon_in_the_card(trainable: str, folder: Path) -> None:
    model = "bert" if trainable == "head" else "gpt2"
    said: list[str] = []
    run = dpzoo.train(recipe(folder, model, trainable=trainable, canaries=40), say=said.append)
    assert run.card is not None
    assert run.audit is not None
    assert run.audit.ok
    assert run.card.units == run.plan.units == 40 + _rows(said)
    assert run.card.delta == 1 / run.card.units
    assert run.card.epsilon <= 3.0
    history = ((run.card.noise_multiplier, run.card.sample_rate, run.card.steps),)
    assert run.audit.epsilon == epsilon_of("prv", history, 1e-5) > run.card.epsilon
    saved = json.loads((folder / "out" / "privacy.json").read_text())
    assert saved["measured"] == {
        "epsilon_at_least": run.audit.epsilon_lower,
        "assuming": ASSUMES[run.audit.largest.name],
        "epsilon_at_least_assuming_nothing": run.audit["any mechanism"].epsilon,
        "epsilon_accounted": run.audit.epsilon,
        "delta": 1e-5,
        "confidence": 0.95,
        "canaries": 40,
    }
    text = (folder / "out" / "README.md").read_text()
    assert re.search(
        r"Epsilon, measured \| at least \d.\d\d, assuming .*; at delta 1e-05, where \d+.\d+ is",
        text,
    )
    assert any(line.startswith("measured  audit of a run: no bound") for line in said)
    with np.load(folder / "out.run" / "canaries.npz") as kept:
        assert (kept["coins"] == run.audit.coins).all()
        assert len(kept["steps"]) == run.card.steps
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    assert not any("canaries" in name for name in stock.state_dict())
    weights = load_file(folder / "out" / "model.safetensors")
    assert not any("canaries" in name for name in weights)


@pytest.mark.parametrize("trainable", others_slow(["head", "lora", "all"], ["all"]))
def test_a_canary_is_in_the_steps_that_draw_it(
    trainable: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through draw, loss, clipping, sum and noise: C at its entry with the sample rate, or nothing."""
    model = "bert" if trainable == "head" else "gpt2"
    told = {"canaries": 300, "epsilon": 8.0, "epochs": 3, "trainable": trainable}
    monkeypatch.setattr("dpzoo.training.job.MOST_CANARIES", 10)  # a row, so that few rows are read
    run = dpzoo.train(recipe(folder, model, **told, batch_size=60))
    assert run.card is not None
    with np.load(folder / "out.run" / "canaries.npz") as kept:
        coins, seen = kept["coins"], kept["seen"]
    rate, noise = run.card.sample_rate, run.card.noise_multiplier
    for coin, mean in ((True, rate), (False, 0.0)):
        some = seen[:, coins == coin]
        error = np.sqrt((noise**2 + rate * (1 - rate)) / some.size)
        assert abs(some.mean() - mean) < 5 * error < 0.15
        variance = noise**2 + mean * (1 - mean)
        assert some.var() == pytest.approx(variance, rel=0.25)


def _rows(said: list[str]) -> int:
    """Rows to train on, as they were said."""
    return int(next(line for line in said if line.startswith("split")).split()[1])


def test_nothing_of_a_run_depends_on_the_coins(folder: Path, monkeypatch: Any) -> None:
    plans = []
    for coin in (True, False):
        monkeypatch.setattr(
            "dpzoo.empirical.gradient_canaries.thrown", lambda n, *_, c=coin: np.full(n, c)
        )
        plan = dpzoo.train(recipe(folder, trainable="all", canaries=20), dry_run=True).plan
        plans.append(replace(plan, seconds=None, memory=None))
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_canaries_of_a_language_model_by_unit_that_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"we eat {i}", "user": f"u{i % 40}"} for i in range(120)]
    (folder / "owned.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = recipe(
        folder, data=str(folder / "owned.jsonl"), unit="user", text="text", epochs=2,
        task="language-modelling", canaries=30, physical_batch_size=8,
    )  # fmt: skip

    def killed(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._ProgressLog, "on_step_end", killed, raising=False)
        with pytest.raises(KeyboardInterrupt):
            dpzoo.train(told)
    with np.load(folder / "out.run" / "canaries.npz") as kept:
        coins, first = kept["coins"], dict(zip(kept["steps"], kept["seen"], strict=True))
    assert first
    run = dpzoo.train({"data": told["data"], "out": told["out"]}, resume=True)
    assert run.card is not None
    assert run.audit is not None
    assert (run.audit.coins == coins).all()
    with np.load(folder / "out.run" / "canaries.npz") as kept:
        assert kept["steps"].tolist() == list(range(run.card.steps))
        for step, values in first.items():
            assert (kept["seen"][step] == values).all(), "steps that are done again are the same"
    assert run.card.unit == "all rows of the training data of one 'user'"
    transformers.GPT2LMHeadModel.from_pretrained(folder / "out")


def test_a_bound_above_the_account_is_said_and_is_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = dpzoo.GradientCanaries.scores
    monkeypatch.setattr(
        dpzoo.GradientCanaries, "scores", lambda self, *a: scores(self, *a) * 0 + self.coins
    )
    words = ["--model", str(folder / "gpt2.json"), "--out", str(folder / "out"), "--epochs", "1"]
    words += ["--epsilon", "0.5", "--canaries", "60", "--batch-size", "16"]
    assert main(["train", str(folder / "rows.jsonl"), *words]) == 1
    assert "measured  audit of a run: FAILED: epsilon is not what" in capsys.readouterr().out
    assert "**audit of a run: FAILED" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", list(ASSUMES))
def test_status_and_card_go_by_the_same_bound_the_largest(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the three it is: a card never shows less than what made the status 1."""
    audit = dpzoo.audit_run

    def with_one_above(*args: Any, **options: Any) -> dpzoo.RunReport:
        report = audit(*args, **options)
        report.bounds = [Bound(b.name, 9.876 if b.name == name else 0.12) for b in report.bounds]
        return report

    monkeypatch.setattr("dpzoo.training.run.audit_run", with_one_above)
    words = ["--model", str(folder / "gpt2.json"), "--out", str(folder / "out"), "--epochs", "1"]
    words += ["--epsilon", "0.5", "--canaries", "10", "--batch-size", "16"]
    assert main(["train", str(folder / "rows.jsonl"), *words]) == 1
    card = (folder / "out" / "README.md").read_text()
    assert f"Epsilon, measured | at least 9.87, assuming {ASSUMES[name]};" in card
    assert ("at least 0.12, assuming nothing" in card) == (name != "any mechanism")
    assert "**audit of a run: FAILED" in card


# --- the checkpoint that is trained -------------------------------------------------------------


def test_only_a_head_may_be_new(folder: Path) -> None:
    config = transformers.BertConfig(**BERT, num_labels=3, vocab_size=259)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(folder / "model")
    path = folder / "model" / "model.safetensors"
    whole = load_file(path)
    task = Task("classification", "text", "label", None, ("n", "p"), "")

    model, _, scratch = load(str(folder / "model"), task)  # a head of 3 classes, for 2
    assert not scratch
    assert model.classifier.weight.shape == (2, 16)
    assert torch.equal(model.bert.pooler.dense.weight, whole["bert.pooler.dense.weight"])

    for gone in ("bert.encoder.layer.0.output.dense.weight", "bert.pooler.dense.bias"):
        save_file({k: v for k, v in whole.items() if k != gone}, path, {"format": "pt"})
        with pytest.raises(dpzoo.InputError, match=f"lacks 1 of .* below its head .{gone}"):
            dpzoo.train(recipe(folder, model=str(folder / "model")))
    wrong = {**whole, "bert.embeddings.word_embeddings.weight": torch.zeros(7, 16)}
    save_file(wrong, path, {"format": "pt"})
    with pytest.raises(dpzoo.InputError, match=r"word_embeddings.weight is \(7, 16\), wanted"):
        dpzoo.train(recipe(folder, model=str(folder / "model")))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda f: None, "The tokenizer of .*checkpoint knows no word of the first .* texts; it has ."),
        (lambda f: (f / "config.json").write_text("{"), r"cannot be loaded by transformers \(OSE"),
        (lambda f: (f / "config.json").write_text('{"model_type": "b\\ud800"}'), "cannot be loaded by"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "checkpoint cannot be loaded by transformers"),
        (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "cannot be loaded by transformers"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"by transformers \(SafetensorError"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 9), r"by transformers \(Safetens"),
        (lambda f: (f / "model.safetensors").rename(f / "model.index"), "no file named model.safetensors"),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be_trained(breaks: Any, message: str, folder: Path) -> None:
    name = checkpoint(folder, transformers.GPT2ForSequenceClassification)
    if message.startswith("The tokenizer"):
        for path in Path(name).glob("*token*"):
            path.unlink()
    breaks(Path(name))
    with pytest.raises(dpzoo.InputError, match=message) as stop:
        dpzoo.train(recipe(folder, model=name))
    assert "\n" not in str(stop.value)
    assert ".." not in str(stop.value).replace("...", "")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    name = checkpoint(folder, transformers.GPT2ForSequenceClassification)
    config = transformers.GPT2Config(**GPT2, vocab_size=99, pad_token_id=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(name)
    with pytest.raises(dpzoo.InputError, match="has 257 tokens and its model a table of 99"):
        dpzoo.train(recipe(folder, model=name))


def test_a_bad_model_from_scratch_is_one_sentence_after_another(folder: Path) -> None:
    for fields, message in (
        (
            {**GPT2, "n_head": 5},
            r"cannot make a model of .*gpt2.json: .*[^.]\. Name another with model",
        ),
        ({**GPT2, "n_layer": 10**9}, "has config.n_layer=1000000000, wanted a whole number"),
        ({"n_layer": 1}, r"cannot make a model of .*[^.]\. Name another with model"),
        (
            {**GPT2, "activation_function": "none"},
            r"cannot make a model of .*: none\. Name|'none'\. Name",
        ),
    ):
        (folder / "gpt2.json").write_text(json.dumps(fields))
        with pytest.raises((dpzoo.InputError, dpzoo.UnsupportedConfigError), match=message):
            dpzoo.train(recipe(folder))
    (folder / "gpt2.json").write_text("nonsense")
    with pytest.raises(dpzoo.InputError, match=r"is not a valid JSON file\. Name another"):
        dpzoo.train(recipe(folder))


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"runs in one process, got WORLD_SIZE=2\. Start it without"
    ):
        dpzoo.train({"data": "rows.tsv"})
