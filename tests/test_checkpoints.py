"""The door that checkpoints come through: refused in one clear line, or whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dpzoo
import dpzoo.checkpoints
from dpzoo.checkpoints import load
from dpzoo.cli import main
from dpzoo.errors import InputError, UnsupportedConfigError, UnsupportedModelError
from dpzoo.models.fields import refuse_sizes
from tests.support import FAMILY, NAMES, TASK, stock_model, tiny_config
from tests.tally import CLEAR, count


@pytest.fixture
def source(tmp_path: Path) -> Path:
    stock_model("BertForSequenceClassification", torch.float32).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


# --- sizes (nothing of them may be built) -------------------------------------------------------

ABSURD = [
    ({"num_hidden_layers": 10**6}, r"num_hidden_layers=1000000, wanted a whole number from 0 to 10,000"),
    ({"num_hidden_layers": 10**12}, r"num_hidden_layers=1000000000000, wanted a whole number"),
    ({"num_labels": 10**12}, r"num_labels=1000000000000, wanted a whole number from 1 to 10,000,000"),
    ({"hidden_size": 10**9}, r"hidden_size=1000000000, wanted a whole number from 1 to 1,000,000"),
    ({"hidden_size": "24"}, r"hidden_size='24', wanted a whole number"),
    ({"hidden_size": 24.5}, r"hidden_size=24.5, wanted a whole number"),
    ({"hidden_size": None}, r"hidden_size=None, wanted a whole number"),
    ({"hidden_size": True}, r"hidden_size=True, wanted a whole number"),
    ({"vocab_size": -1}, r"vocab_size=-1, wanted a whole number from 1"),
    ({"num_attention_heads": 0}, r"num_attention_heads=0, wanted a whole number from 1"),
    ({"vocab_size": [61] * 1000}, r"vocab_size=\[61, 61, 61, .*\.\.\., wanted a whole number"),
    ({"hidden_dropout_prob": 7}, r"hidden_dropout_prob=7, wanted a number from 0 to 1"),
    ({"attention_probs_dropout_prob": "0.1"}, r"attention_probs_dropout_prob='0.1', wanted a number"),
    ({"layer_norm_eps": -1.0}, r"layer_norm_eps=-1.0, wanted a number from 0 on"),
    ({"layer_norm_eps": float("nan")}, r"layer_norm_eps=nan, wanted a number from 0 on"),
    ({"id2label": {"one": "good"}}, r"id2label=\{'one': 'good'\}, wanted an object with a name for each"),
    ({"architectures": [["BertModel"]]}, r"architectures=\[\['BertModel'\]\], wanted a list of names"),
    ({"architectures": {"0": "BertModel"}}, r"architectures=\{'0': 'BertModel'\}, wanted a list of names"),
    ({"id2label": ["good"]}, r"id2label=\['good'\], wanted an object with a name for each"),
    (
        {"hidden_size": 900_000, "vocab_size": 90_000_000},
        r"a config of 8.7e\+13 parameters \(width 900000, 2 layers, tables of 90000000, 23, 3 rows\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), ABSURD, ids=[str(f)[:40] for f, _ in ABSURD])
def test_an_absurd_config_is_named_before_anything_is_built(
    fields: dict[str, Any], message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    edit_config(source, **fields)
    for call in (
        lambda: dpzoo.from_pretrained(source),
        lambda: dpzoo.BertForSequenceClassification.from_pretrained(source),
        lambda: dpzoo.from_config(str(source)),
        lambda: load(source),
    ):
        with pytest.raises(UnsupportedConfigError, match=message):
            call()
    assert main(["convert", str(source), str(tmp_path / "out"), "--json"]) == 2
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["ok"] is False
    assert captured.err == f"dpzoo: {data['error']}\n"
    assert not (tmp_path / "out").exists()
    count("a config.json with an absurd or mistyped value", CLEAR)


def test_absurd_arguments_are_named_too(source: Path) -> None:
    with pytest.raises(UnsupportedConfigError, match=r"num_labels=1000000000000, wanted"):
        dpzoo.from_pretrained(source, num_labels=10**12)
    with pytest.raises(UnsupportedConfigError, match=r"n_layer=1000000, wanted"):
        dpzoo.GPT2Model(tiny_config("GPT2Model", n_layer=10**6))


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_configs_pass(name: str) -> None:
    refuse_sizes(name, tiny_config(name).to_dict())
    refuse_sizes(name, type(tiny_config(name))().to_dict())


# --- other families -----------------------------------------------------------------------------

PAIRS = [(a, b) for a in FAMILY.values() for b in FAMILY.values() if a != b]


@pytest.mark.parametrize(("of", "by"), sorted(set(PAIRS)))
def test_a_class_refuses_another_familys_checkpoint(of: str, by: str, tmp_path: Path) -> None:
    names = {FAMILY[name]: name for name in NAMES if TASK[name] == "base"}
    stock_model(names[of], torch.float32).save_pretrained(tmp_path)
    message = (
        rf"{names[by]} got .*, which is of the family '{of}', wanted '{by}': none of its weights"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        getattr(dpzoo, names[by]).from_pretrained(tmp_path)
    config = tiny_config(names[of])
    with pytest.raises(UnsupportedModelError, match=message):
        getattr(dpzoo, names[by]).from_pretrained(tmp_path, config=config)


# --- what must be there -------------------------------------------------------------------------


def empty(state: dict[str, torch.Tensor]) -> None:
    state.clear()


def rename(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[f"other.{name}"] = state.pop(name)


def lose_a_layer(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".layer.1." in name]:
        del state[name]


def lose_one(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.pop(name)


LOSSES = [
    (empty, "bert.embeddings.LayerNorm.bias"),
    (rename, "bert.embeddings.LayerNorm.bias"),
    (lose_a_layer, "bert.encoder.layer.1.attention.output.LayerNorm.bias"),
    (lose_one("bert.pooler.dense.bias"), "bert.pooler.dense.bias"),
    (lose_one("classifier.bias"), "classifier.bias"),
    (lose_one("bert.embeddings.word_embeddings.weight"), "bert.embeddings.word_embeddings.weight"),
]


@pytest.mark.parametrize(("change", "name"), LOSSES, ids=[name for _, name in LOSSES])
def test_a_checkpoint_that_is_not_whole_is_refused(
    change: Callable[..., Any], name: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    edit_weights(source, change)
    with pytest.raises(
        InputError, match=rf"source lacks {name}.*: a BertForSequenceClassification of it"
    ):
        load(source)
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    (check,) = [
        one for one in data["checks"] if one["name"].startswith("parameters that the source")
    ]
    assert check["where"].startswith(name)
    assert data["ok"] is False
    assert not out.exists()


def test_a_flag_takes_it_all_the_same(source: Path, tmp_path: Path, capsys: Any) -> None:
    edit_weights(source, lose_a_layer)
    assert main(["convert", str(source), str(tmp_path / "out"), "--fresh"]) == 0
    assert (
        "random, because the source does not have them: bert.encoder.layer.1"
        in capsys.readouterr().out
    )
    assert load(source, fresh=True) is not None


def test_a_new_head_may_be_random_and_an_old_one_not(source: Path) -> None:
    edit_weights(
        source, lambda state: [state.pop(f"classifier.{one}") for one in ("weight", "bias")]
    )
    load(source, "masked-lm")
    with pytest.raises(InputError, match=r"source lacks classifier.bias, classifier.weight: a"):
        load(source)
    edit_config(source, architectures=["BertForSomethingElse"])
    load(source, "sequence-classification")  # nobody knows what that class had
    edit_weights(source, lambda state: state.pop("bert.encoder.layer.0.output.dense.bias"))
    with pytest.raises(InputError, match=r"source lacks bert.encoder.layer.0.output.dense.bias: a"):
        load(source, "sequence-classification")


def test_nothing_but_a_models_class_is_called_by_the_name_that_a_checkpoint_gives(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(
        transformers, "hostile", lambda config: called.append(config), raising=False
    )
    edit_config(source, architectures=["hostile"])
    edit_weights(source, lose_a_layer)
    with pytest.raises(InputError, match=r"source lacks bert.encoder.layer.1"):
        load(source, "sequence-classification")
    assert called == []


def test_not_a_number_is_named_and_the_json_is_valid(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    name = "bert.encoder.layer.0.output.dense.bias"
    edit_weights(source, lambda state: state[name].fill_(float("nan")))
    assert main(["convert", str(source), str(tmp_path / "out"), "--json"]) == 1
    text = capsys.readouterr().out
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = {one["name"]: one for one in data["checks"]}
    assert found["parameters with values that are not finite"]["where"] == name
    assert found["parameters, stock and dpzoo"]["error"] == 0, "they are equal, bit by bit"
    assert found["outputs, stock and dpzoo"]["error"] is None
    assert not (tmp_path / "out").exists()


# --- what cannot be read ------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (truncated, r"source cannot be loaded by transformers \(SafetensorError\): "),
    (
        no_weights,
        r"source cannot be loaded by transformers \(OSError\): .*no file named model.safetensors",
    ),
    (no_object, r"source cannot be loaded by transformers \(\w+\): "),
    (deep, r"source cannot be loaded by transformers \(\w+\): "),
    (binary, r"source cannot be loaded by transformers \(\w+\): "),
    (
        lambda folder: edit_config(folder, vocab_size=62),
        r"source does not fit its config.json: bert.embeddings.word_embeddings.weight is \(61, 24\), "
        r"wanted \(62, 24\). Restore the config.json",
    ),
    (
        lambda folder: edit_config(folder, model_type="t5"),
        r"of the family 't5'. Wanted one of: bert|cannot be loaded by transformers \(Strict",
    ),
    (
        lambda folder: edit_config(folder, model_type=7),
        r"of the family '7'. Wanted one of: bert|has model type `7`",
    ),
    (lambda folder: edit_config(folder, hidden_act="nonsense"), r"nonsense"),
    (
        lambda folder: edit_config(folder, num_attention_heads=5),
        r"hidden size.*24.*5|24.*multiple.*5",
    ),
    (
        lambda folder: edit_config(folder, architectures=["../x"]),
        r"saved from ../x, which (dpz|the)",
    ),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("command", ["convert", "audit", "bench"])
def test_a_broken_checkpoint_is_one_clear_line_in_every_command(
    command: str,
    breaks: Callable[[Path], Any],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    breaks(source)
    words = {"convert": [str(tmp_path / "out")], "bench": ["--processes", "0"]}.get(command, [])
    assert main([command, str(source), *words, "--json"]) == 2
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["ok"] is False
    assert re.search(message, data["error"]), data["error"]
    assert captured.err == f"dpzoo: {data['error']}\n"
    count("a broken checkpoint in convert, audit and bench", CLEAR)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/folder", "There is no folder '/no/folder'. Wanted one with a checkpoint, or a hub id."),
        ("./nowhere", "There is no folder './nowhere'."),
        ("no/such/place", "There is no folder 'no/such/place'."),
        ("", "There is no folder ''."),
        ("no/model", "no/model cannot be loaded by transformers (OSError): the hub cannot be reached"),
    ],
)  # fmt: skip
def test_a_missing_folder_is_no_hub_id_and_a_hub_out_of_reach_is_asked_once(
    name: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("".join(f"text {i}\t{i % 2}\n" for i in range(40)))
    for command, words in (("convert", [str(tmp_path / "out")]), ("audit", []), ("bench", [])):
        assert main([command, name, *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", str(rows), "--model", name]) == 2
    assert message in capsys.readouterr().err


def no_safetensors(folder: Path, saved: Any) -> None:
    (folder / "model.safetensors").unlink()
    if isinstance(saved, bytes):
        (folder / "pytorch_model.bin").write_bytes(saved)
    elif isinstance(saved, str):
        (folder / "model.safetensors.index.json").write_text(saved)
    else:
        torch.save(saved, folder / "pytorch_model.bin")


DAMAGED: list[tuple[Callable[[Path], Any], str]] = [
    (truncated, r"cannot be loaded by transformers \(SafetensorError\)"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 12), r"\(SafetensorError\): .*too large"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 12), r"\(SafetensorError\): .*invalid JSON"),
    (lambda f: no_safetensors(f, "{}"), r"cannot be loaded by transformers \(KeyError\): 'weight_map'"),
    (lambda f: no_safetensors(f, "[]"), r"cannot be loaded by transformers \(TypeError\): list indices"),
    (lambda f: no_safetensors(f, '{"weight_map": [1]}'), r"by transformers \(AttributeError\)"),
    (lambda f: no_safetensors(f, '{"metadata": {}, "weight_map": {"a": 3}}'), r"\(TypeError\): "),
    (lambda f: no_safetensors(f, b""), r"cannot be loaded by transformers \(EOFError\): no message"),
    (lambda f: no_safetensors(f, b"hello"), r"cannot be loaded by transformers \(KeyError\)"),
    (lambda f: no_safetensors(f, [1, 2]), r"cannot be loaded by transformers \(TypeError\)"),
    (no_object, r"cannot be loaded by transformers \(\w+\)"),
    (lambda f: (f / "adapter_config.json").write_text("{"), r"by transformers \(JSONDecodeError\)"),
    (lambda f: edit_config(f, problem_type="x"), r"problem_type='x', wanted one of: regression, single_la"),
    (lambda f: edit_config(f, dtype="float99"), r"by transformers \(AttributeError\): module 'torch' has"),
    # As a training loop of somebody's has it, with the weights one level down.
    (
        lambda f: no_safetensors(f, {"epoch": 3, "state_dict": load_file(f / "model.safetensors")}),
        r"has none of its 41 parameters \(bert.embeddings.* and other keys: epoch, state_dict.*Wanted a",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("breaks", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_checkpoint_is_an_error_of_ours_in_python_too(
    breaks: Callable[[Path], Any], message: str, source: Path
) -> None:
    breaks(source)
    for call in (dpzoo.from_pretrained, dpzoo.BertForSequenceClassification.from_pretrained):
        with pytest.raises((InputError, UnsupportedConfigError), match=message):
            call(source)


def test_a_task_that_is_no_name(source: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Family 'bert' does not know task 3"):
        dpzoo.from_pretrained(source, task=3)  # type: ignore[arg-type]


def test_a_file_is_no_checkpoint(source: Path, capsys: Any) -> None:
    assert main(["audit", str(source / "model.safetensors")]) == 2
    assert (
        "model.safetensors is a file, wanted a folder with a checkpoint" in capsys.readouterr().err
    )


def test_panics_of_the_libraries_are_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As of a library that is written in Rust."""

    def panic(*args: Any, **kwargs: Any) -> Any:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(dpzoo.checkpoints, "read_fields", panic)
    with pytest.raises(InputError, match=r"\(PanicException\): index out of bounds"):
        load(source)
