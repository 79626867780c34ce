"""What meets the models in the wild: transformers' losses, Trainer, pipelines, generate, and PEFT."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import dpzoo
from tests.support import (
    FAMILY,
    NAMES,
    ROWS,
    SEQ,
    TASK,
    VOCAB,
    assert_bit_equal,
    assert_same_outputs,
    batch_for,
    input_shape,
    inputs_for,
    labels_for,
    largest_error,
    row_of,
    snapshot,
    stock_model,
)

# --- the loss -----------------------------------------------------------------------------------

WITH_LOSS = [name for name in NAMES if TASK[name] != "base"]
LOSS_ROUNDING = {"causal-lm": 1e-6, "double-heads": 1e-6}
"""float32's, in which stock causal heads compute their loss, whatever the dtype; others: 1e-10."""
BY_TOKEN = ("masked-lm", "causal-lm", "pre-training", "double-heads", "token-classification")
"""Tasks with a label for each token: there the number of labelled tokens can differ by row."""

PADDING = {"question-answering": "none"}
"""Stock's softmax over the positions of an answer runs over padding too, and dpzoo's does not."""


def even_labels(name: str) -> dict[str, torch.Tensor]:
    """As `labels_for`, with as many labelled tokens in every row, at different places."""
    labels = labels_for(name)
    if TASK[name] in BY_TOKEN:
        shape = input_shape(name)
        classes = 5 if TASK[name] == "token-classification" else VOCAB
        labels["labels"] = torch.randint(0, classes, shape)
        for i, row in enumerate(labels["labels"]):
            row.view(-1)[1 + i : 4 + i] = -100
    if TASK[name] == "question-answering":
        labels["end_positions"] = torch.randint(0, SEQ, (ROWS,))
    return labels


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_loss_is_stock_where_rows_have_equally_many_labels(name: str) -> None:
    """A loss that is off by a factor or a shift trains, and trains something else."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    batch = {**inputs_for(name, padding=PADDING.get(TASK[name], "right")), **even_labels(name)}
    tolerance = LOSS_ROUNDING.get(TASK[name], 1e-10)
    wanted, got = stock(**batch), zoo(**batch)
    assert list(got) == list(wanted)
    for key in wanted:
        if key.endswith("loss"):
            assert largest_error(got[key], wanted[key]) <= tolerance, key
    assert got.loss_per_sample.shape == (ROWS,)
    assert torch.equal(got.loss, got.loss_per_sample.mean())


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_loss_is_the_mean_of_stock_losses_of_single_rows(name: str) -> None:
    """Where rows differ in labelled tokens, transformers divides by the batch's: here rows stay apart.

    Token heads and question answering (positions outside the sequence) then differ from stock, by
    design; the other heads have one label a row and never do.
    """
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    batch = batch_for(name, padding=PADDING.get(TASK[name], "right"))
    if TASK[name] == "question-answering":
        # A row without an answer in reach; stock divides 0 by 0 for half a row.
        batch["end_positions"] = torch.randint(0, SEQ, (ROWS,))
        batch["start_positions"][0] = batch["end_positions"][0] = SEQ + 1
    got = zoo(**batch)
    rows = [stock(**row_of(batch, i)) for i in range(ROWS)]
    for key in (key for key in got if key.endswith("loss")):
        # Stock divides 0 by 0 for a row without a single label; here such a row has loss 0.
        wanted = torch.stack([row[key] for row in rows]).nan_to_num(0.0)
        assert largest_error(got[key], wanted.mean()) <= LOSS_ROUNDING.get(TASK[name], 1e-10), key
    assert largest_error(zoo(**batch, num_items_in_batch=3).loss, got.loss) == 0.0
    differs = TASK[name] in BY_TOKEN or TASK[name] == "question-answering"
    assert (largest_error(stock(**batch).loss, got.loss) > 1e-4) is differs


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_losses_of_regression_and_of_several_labels_are_stock(family: str) -> None:
    """problem_type, set or inferred from the labels, chooses the loss; and is remembered alike."""
    name = next(n for n in NAMES if FAMILY[n] == family and TASK[n] == "sequence-classification")
    for labels, options in (
        (torch.randn(ROWS), {"num_labels": 1}),
        (torch.randn(ROWS, 1), {"num_labels": 1}),
        (torch.randn(ROWS, 5), {"problem_type": "regression"}),
        (torch.rand(ROWS, 5).round(), {}),
        (torch.rand(ROWS, 5).round(), {"problem_type": "multi_label_classification"}),
        (torch.randint(0, 5, (ROWS,)), {}),
    ):
        stock = stock_model(name, **options)
        zoo = dpzoo.convert(stock)
        labels = labels.double() if labels.is_floating_point() else labels
        batch = {**inputs_for(name), "labels": labels}
        assert largest_error(zoo(**batch).loss, stock(**batch).loss) <= 1e-10
        assert zoo.config.problem_type == stock.config.problem_type


# --- Trainer ------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows of a batch, as a Trainer takes them."""

    def __init__(self, name: str, count: int = 8) -> None:
        torch.manual_seed(11)
        batch = inputs_for(name, padding="right", rows=count)
        batch.pop("token_type_ids", None)
        if TASK[name] in BY_TOKEN:
            labels = torch.randint(0, 5, (count, SEQ))
        else:
            labels = torch.randint(0, 5, (count,))
        self.rows = [row_of({**batch, "labels": labels}, i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.rows[i].items()}


pytestmark = pytest.mark.usefixtures("quiet")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Plain SGD without clipping: Adam and clipping would hide the scale of a loss."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    # Users' metrics take argmax of this: a tuple with losses or hidden states would break them.
    assert isinstance(prediction.predictions, np.ndarray)
    assert prediction.predictions.shape == (8, 5)
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "sequence-classification"])
def test_trainer_trains_as_it_trains_stock(name: str, tmp_path: Path) -> None:
    """The whole loop, evaluation and metrics included, gives the stock model's weights and numbers."""
    stock = stock_model(name, torch.float32)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    before, results = snapshot(stock), []
    for model in (stock, zoo):
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=Rows(name),
            eval_dataset=Rows(name),
            compute_metrics=accuracy,
        )
        loss = trainer.train().training_loss
        metrics = trainer.evaluate()
        results.append((loss, metrics["eval_loss"], metrics["eval_accuracy"]))
    assert results[1] == pytest.approx(results[0], rel=1e-5)  # float32, two steps
    wanted = stock.state_dict()
    for key, value in zoo.state_dict().items():
        assert largest_error(value, wanted[key]) <= 1e-5, key  # float32, two steps
    assert any(not torch.equal(value, before[key]) for key, value in wanted.items())


def test_accumulated_steps_equal_one_step_of_all_rows(tmp_path: Path) -> None:
    """Trainer must scale the loss by its accumulation steps, as nothing in the model does."""
    name = "BertForTokenClassification"
    stock = stock_model(name, torch.float32)
    results = []
    for batch, steps in ((4, 1), (2, 2)):
        zoo = dpzoo.convert(copy.deepcopy(stock))
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        Trainer(
            model=zoo, args=arguments(tmp_path, max_steps=1, **options), train_dataset=Rows(name, 4)
        ).train()
        results.append(zoo.state_dict())
    before = stock.state_dict()
    for key, value in results[0].items():
        assert largest_error(results[1][key], value) <= 1e-6, key  # float32, one step
    assert any(not torch.equal(value, before[key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_trainer_resumes_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more: the same weights as four steps, ties and layouts kept."""
    start = stock_model(name, torch.float32)
    runs = {}
    for run in ("straight", "resumed"):
        zoo = dpzoo.convert(copy.deepcopy(start))
        trainer = Trainer(
            model=zoo,
            args=arguments(
                tmp_path / "out",
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                optim="adamw_torch",
            ),
            train_dataset=Rows(name, 16),
        )
        checkpoint = str(tmp_path / "out" / "checkpoint-2") if run == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        runs[run] = zoo
        head = zoo.get_output_embeddings()
        assert head.weight is zoo.get_input_embeddings().weight
        assert type(head) is dpzoo.layers.LMHead
    assert_bit_equal(runs["resumed"].state_dict(), runs["straight"].state_dict())
    stock, report = type(start).from_pretrained(
        tmp_path / "out" / "checkpoint-4", output_loading_info=True
    )
    assert not any(report.values())
    assert_bit_equal(stock.state_dict(), runs["straight"].state_dict())


def test_trainer_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    """GPT-2's square projections load in the wrong layout without a complaint: values are compared."""
    name = "GPT2ForSequenceClassification"
    zoo = dpzoo.convert(stock_model(name, torch.float32))
    scores = iter([0.9, 0.1])
    trainer = Trainer(
        model=zoo,
        args=arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        ),
        train_dataset=Rows(name),
        eval_dataset=Rows(name),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best, last = (load_file(tmp_path / f"checkpoint-{i}" / "model.safetensors") for i in (1, 2))
    assert_bit_equal(zoo.state_dict(), best)
    square = "transformer.h.0.attn.c_proj.weight"
    assert not torch.equal(best[square], last[square])
    assert torch.equal(zoo.get_submodule(square.removesuffix(".weight")).weight.t(), best[square])
    stock = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1")
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(zoo, stock, inputs, tolerance=1e-5)
    assert_same_outputs(
        dpzoo.from_pretrained(tmp_path / "checkpoint-1"), zoo, inputs, tolerance=0.0
    )


# --- tokenizers and pipelines -------------------------------------------------------------------

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "tree", "big", "small", "red", "blue"]
SENTENCES = ["the cat sat on the mat", "a big dog ran", "the red tree on the blue mat"]


@pytest.fixture(scope="module")
def word_pieces() -> Any:
    """A BERT tokenizer over a handful of words; [PAD] has the id of the tiny configs."""
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    return transformers.BertTokenizer(vocab=vocabulary)


@pytest.fixture(scope="module")
def byte_pairs() -> Any:
    """A GPT-2 tokenizer over the letters of three sentences; all 256 bytes would be too many."""
    letters = sorted({c for text in SENTENCES for c in text.replace(" ", "Ġ")})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", "<s>", "</s>", *letters])}
    return transformers.GPT2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def assert_same_answers(got: Any, wanted: Any) -> None:
    """Two answers of a pipeline: equal but for the rounding of numbers."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, list):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same_answers(a, b)
    elif isinstance(wanted, (float, np.floating)):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)  # float32, two layers
    else:
        assert got == wanted


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("text-classification", "BertForSequenceClassification"),
        ("text-classification", "RobertaForSequenceClassification"),
        ("text-classification", "DistilBertForSequenceClassification"),
        ("text-classification", "GPT2ForSequenceClassification"),
        ("token-classification", "BertForTokenClassification"),
        ("token-classification", "DistilBertForTokenClassification"),
        ("fill-mask", "BertForMaskedLM"),
        ("fill-mask", "RobertaForMaskedLM"),
        ("fill-mask", "DistilBertForMaskedLM"),
        ("feature-extraction", "BertModel"),
        ("feature-extraction", "GPT2Model"),
        ("text-generation", "GPT2LMHeadModel"),
    ],
)
def test_pipelines_answer_as_with_stock(
    task: str, name: str, word_pieces: Any, byte_pairs: Any, tmp_path: Path
) -> None:
    """From a saved folder with its tokenizer, as users do it; and the same answers as stock's."""
    tokenizer = byte_pairs if FAMILY[name] == "gpt2" else word_pieces
    if FAMILY[name] == "distilbert":  # it has no token types, and its tokenizer gives none
        tokenizer = transformers.DistilBertTokenizer(vocab=word_pieces.get_vocab())
    stock = stock_model(name, torch.float32, max_position_embeddings=64)
    zoo = dpzoo.convert(stock)
    zoo.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = SENTENCES
    if task == "fill-mask":
        texts = [text.replace("sat", "[MASK]").replace("big", "[MASK]") for text in SENTENCES[:2]]
    options = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {}
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[0])["input_ids"] == tokenizer(texts[0])["input_ids"]
    answers = []
    for model in (stock, zoo, dpzoo.from_pretrained(tmp_path)):
        pipe = transformers.pipeline(task, model=model, tokenizer=loaded, device="cpu")
        answers.append(pipe(texts, batch_size=2, **options))
    assert_same_answers(answers[1], answers[0])
    assert_same_answers(answers[2], answers[0])
    assert len(answers[0]) == len(texts)


def test_collators_and_tokenizers_meet_the_language_models(
    word_pieces: Any, byte_pairs: Any
) -> None:
    """What Trainer feeds: padded batches with labels masked at random; every row has a finite loss."""
    for name, tokenizer, mlm in (
        ("BertForMaskedLM", word_pieces, True),
        ("GPT2LMHeadModel", byte_pairs, False),
    ):
        zoo = dpzoo.convert(stock_model(name, torch.float32, max_position_embeddings=64)).train()
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=mlm)
        batch = collate([tokenizer(text) for text in SENTENCES])
        outputs = zoo(**batch)
        assert outputs.loss_per_sample.shape == (3,)
        assert outputs.loss_per_sample.isfinite().all()
        outputs.loss.backward()


# --- generation ---------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.95},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "BertLMHeadModel", "RobertaForCausalLM"]
)
def test_generate_equals_stock(name: str, strategy: str, cache: bool) -> None:
    """Token for token, with the same seed; left padding shows positions and masks of cached steps."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock)
    ids = torch.randint(4, VOCAB, (3, 5))
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, count in ((0, 2), (2, 3)):
        padded[row, :count], mask[row, :count] = 1, 0
    for prompt in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        results = []
        for model in (stock, zoo):
            torch.manual_seed(5)
            options = {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 1}
            results.append(
                model.generate(**prompt, **options, **STRATEGIES[strategy], use_cache=cache)
            )
        assert torch.equal(*results)
        assert results[0].shape[1] == 12
        assert len(results[0][:, 5:].unique()) > 2, (
            "the model says one thing only: nothing is tested"
        )


def test_generate_after_training_mode_and_with_outputs() -> None:
    """Scores, and a dictionary as the result: what evaluation scripts read."""
    stock = stock_model("GPT2LMHeadModel")
    zoo = dpzoo.convert(stock)
    ids = torch.randint(4, VOCAB, (2, 4))
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "pad_token_id": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    wanted, got = stock.generate(ids, **options), zoo.generate(ids, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    for a, b in zip(got.scores, wanted.scores, strict=True):
        assert largest_error(a, b) <= 1e-10
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4


# --- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("RobertaForSequenceClassification", "SEQ_CLS"),
        ("DistilBertForSequenceClassification", "SEQ_CLS"),
        ("GPT2ForSequenceClassification", "SEQ_CLS"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
    ],
)
def test_lora_trains_as_on_stock_and_its_adapter_fits_stock(
    name: str, task: str, tmp_path: Path
) -> None:
    """Default target modules, one step, and the adapter's file goes on the stock model too."""
    stock = stock_model(name, torch.float32)
    before = snapshot(stock)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    # PEFT knows which modules to adapt by model_type, DistilBERT's excepted.
    targets = ["q_lin", "v_lin"] if FAMILY[name] == "distilbert" else None
    lora = peft.LoraConfig(
        task_type=task, r=2, target_modules=targets, lora_dropout=0.0, init_lora_weights=False
    )
    adapted = peft.get_peft_model(zoo, lora)
    trained = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in k or "classifier" in k or "score" in k for k in trained), trained
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    batch = {**inputs_for(name, dtype=torch.float32), **even_labels(name)}
    first = adapted(**batch)
    assert first.loss_per_sample.shape == (ROWS,)
    first.loss.backward()
    optimizer.step()
    assert adapted(**batch).loss < first.loss
    adapted.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapter")
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(adapted.eval(), other.eval(), inputs, tolerance=1e-5)
    # State dicts of adapted models keep the stock layout of the weights below the adapters.
    assert_bit_equal(adapted.state_dict(), other.state_dict())
    again = peft.get_peft_model(dpzoo.convert(stock_model(name, torch.float32)), lora).eval()
    again.load_state_dict(other.state_dict(), strict=True)
    assert_same_outputs(again, other, inputs, tolerance=1e-5)
    # Merged, it is a stock checkpoint like any other.
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain, report = type(stock).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(plain, merged, inputs, tolerance=1e-5)
    assert any(not torch.equal(value, before[key]) for key, value in plain.state_dict().items())
