"""Random models, batches and modes against rows alone; random damage to checkpoints, configs and ledgers.

``make fuzz`` draws as many more as there is time for. What it finds becomes a test of its own, elsewhere.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dpzoo
from dpzoo.checkpoints import load
from dpzoo.cli import main
from dpzoo.errors import DpzooError, InputError
from dpzoo.integrations.state import PrivacyState, digests, save_random_state
from dpzoo.ledger import Ledger
from dpzoo.models.base import PerSampleModel
from tests.modes import ALL_MODES, assert_model_step_is_exact, oracle_norms
from tests.support import FAMILY, NAMES, TASK, TIED, batch_for, oracle_gradients, stock_model
from tests.tally import AS_STOCK, CLEAR, WHOLE, count, no_hang


def examples(count: int) -> int:
    """How many examples a property gets; under ``make fuzz`` DPZOO_FUZZ times as many, and new ones."""
    return count * int(os.environ.get("DPZOO_FUZZ", 1))


# --- models -------------------------------------------------------------------------------------

FIELDS = {
    "width": ("hidden_size", "hidden_size", "dim", "n_embd"),
    "heads": ("num_attention_heads", "num_attention_heads", "n_heads", "n_head"),
    "layers": ("num_hidden_layers", "num_hidden_layers", "n_layers", "n_layer"),
    "inner": ("intermediate_size", "intermediate_size", "hidden_dim", "n_inner"),
    "act": ("hidden_act", "hidden_act", "activation", "activation_function"),
}
FAMILIES = ("bert", "roberta", "distilbert", "gpt2")


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """A class, its config, a mode, and what makes a batch."""
    name = draw(st.sampled_from(NAMES))
    heads = draw(st.integers(1, 4))
    chosen = {
        "heads": heads,
        # A norm over two values gives signs: its gradient is rounding.
        "width": heads * draw(st.integers(2 if heads > 1 else 4, 7)),
        "layers": draw(st.integers(1, 2)),
        "inner": draw(st.integers(1, 30)),
        "act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu", "tanh"])),
    }
    family = FAMILIES.index(FAMILY[name])
    config = {FIELDS[key][family]: value for key, value in chosen.items()}
    if name in TIED:
        config["tie_word_embeddings"] = draw(st.booleans())
    if FAMILY[name] == "gpt2":
        config["scale_attn_weights"] = draw(st.booleans())
        config["scale_attn_by_inverse_layer_idx"] = draw(st.booleans())
    return {
        "name": name,
        "config": config,
        "width": chosen["width"],
        "mode": draw(st.sampled_from(ALL_MODES)),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "rows": draw(st.integers(1, 5)),
        "seq": draw(st.integers(2, 9)),
        "padding": draw(st.sampled_from(["none", "right", "left", "holes"])),
        "embeds": draw(st.booleans()),
        "ignored": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def batch_of(problem: dict[str, Any]) -> dict[str, torch.Tensor]:
    name, shape = problem["name"], {key: problem[key] for key in ("rows", "seq")}
    # Opacus' modes want every parameter used; stock double heads with embeddings have no choices.
    embeds = problem["embeds"] and problem["mode"] == "bk" and TASK[name] != "double-heads"
    batch = batch_for(name, embeds=embeds, hidden=problem["width"], padding="none", **shape)
    given = batch["inputs_embeds"][..., 0] if embeds else batch["input_ids"]
    length = given.shape[-1]
    if problem["padding"] != "none":
        mask = torch.ones(given.shape, dtype=torch.long)
        for row in mask.view(-1, length):
            cut = int(torch.randint(0, length, ()))
            if problem["padding"] == "right":
                row[length - cut :] = 0
            elif problem["padding"] == "left":
                row[:cut] = 0
            else:
                row[torch.rand(length) < 0.4] = 0
                row[cut] = 1
        # Where a classifier of GPT-2's is given embeddings, stock reads the last token, real or not.
        if embeds and name == "GPT2ForSequenceClassification":
            mask[..., -1] = 1
        batch["attention_mask"] = mask
    labels = batch.get("labels")
    if labels is not None and labels.ndim > 1:
        labels[torch.rand(labels.shape) < problem["ignored"]] = -100
    return batch


@settings(max_examples=examples(200))
@given(problem=problems())
def test_a_step_of_any_model_in_any_mode_is_that_of_its_rows_alone(problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    stock = stock_model(problem["name"], **problem["config"])
    batch = batch_of(problem)
    wanted = oracle_gradients(problem["name"], stock, batch)
    model = dpzoo.convert(stock)
    norms = oracle_norms(wanted, [name for name, _ in model.named_parameters()])
    assume(float(norms.max()) > 1e-6)  # something is learnt: not all labels are ignored, say
    event(problem["mode"])
    assert_model_step_is_exact(
        problem["name"],
        problem["mode"],
        batch,
        model,
        wanted,
        rows=problem["rows"],
        reduction=problem["reduction"],
    )
    count("a private step of a random model, batch and mode, against its rows alone", AS_STOCK)


# --- checkpoints --------------------------------------------------------------------------------

SMALL = [
    "BertForSequenceClassification",
    "GPT2LMHeadModel",
    "DistilBertModel",
    "RobertaForMaskedLM",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in SMALL:
        made[name] = tmp_path_factory.mktemp(name)
        stock_model(name, torch.float32).save_pretrained(made[name])
    return made


VALUES = st.recursive(
    # Nothing between 1,000 and 10^9: some would be built, and take the machine's memory.
    st.none() | st.booleans() | st.integers(-3, 1000) | st.integers(10**9, 10**18) | st.text(max_size=8)
    | st.floats() | st.sampled_from(["relu", "eager", "gpt2", "float32", "BertModel"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """A change of a file's bytes."""
    at, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))
    other = draw(st.binary(max_size=12))

    def flip(data: bytes) -> bytes:
        i = int(at * len(data))
        return data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]

    def cut(data: bytes) -> bytes:
        return data[: int(at * len(data))]

    def insert(data: bytes) -> bytes:
        i = int(at * len(data))
        return data[:i] + other + data[i:]

    def early(data: bytes) -> bytes:  # where the header of the file is
        i = int(at * min(len(data), 200))
        return data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]

    def swap_lines(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        i = int(at * len(lines))
        lines[i], lines[bit % len(lines)] = lines[bit % len(lines)], lines[i]
        return b"".join(lines)

    def drop_line(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        del lines[int(at * len(lines))]
        return b"".join(lines)

    def double_line(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        i = int(at * len(lines))
        return b"".join(lines[: i + 1] + lines[i:])

    return draw(st.sampled_from([flip, cut, insert, early, swap_lines, drop_line, double_line]))


def copied(source: Path, folder: str) -> Path:
    place = Path(folder) / "source"
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def refused_or_whole(place: Path, kind: str) -> None:
    """A checkpoint is loaded, or refused by an error of ours."""
    try:
        with no_hang():
            model = load(place)
    except DpzooError:
        event("refused")
        count(kind, CLEAR)
        return
    event("loaded")
    assert isinstance(model, PerSampleModel)
    count(kind, AS_STOCK)


@settings(max_examples=examples(90))
@given(name=st.sampled_from(SMALL), data=st.data(), value=VALUES)
def test_a_config_with_any_value_is_refused_or_loads(
    name: str, data: Any, value: Any, sources: dict[str, Path]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = copied(sources[name], folder)
        fields = json.loads((place / "config.json").read_text())
        field = data.draw(st.sampled_from(sorted(fields)) | st.text(max_size=8))
        fields[field] = value
        (place / "config.json").write_text(json.dumps(fields))
        refused_or_whole(place, "a config.json with any value in any field")


@settings(max_examples=examples(90))
@given(
    name=st.sampled_from(SMALL),
    file=st.sampled_from(["config.json", "model.safetensors"]),
    damage=damages(),
)
def test_a_checkpoint_with_any_damage_is_refused_or_loads(
    name: str, file: str, damage: Callable[[bytes], bytes], sources: dict[str, Path]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = copied(sources[name], folder)
        (place / file).write_bytes(damage((place / file).read_bytes()))
        refused_or_whole(place, "a checkpoint with bytes flipped, cut, inserted, or lines moved")


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(name=st.sampled_from(SMALL), data=st.data())
def test_convert_never_certifies_what_lacks_a_tensor(
    name: str, data: Any, sources: dict[str, Path]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, out = copied(sources[name], folder), Path(folder) / "out"
        state = load_file(place / "model.safetensors")
        victim = data.draw(st.sampled_from(sorted(state)))
        kind = data.draw(st.sampled_from(["drop", "rename", "reshape", "nan", "half"]))
        tensor = state.pop(victim)
        if kind == "rename":
            state[f"{victim}x"] = tensor
        elif kind == "reshape":
            state[victim] = torch.cat([tensor, tensor])
        elif kind == "nan":
            state[victim] = tensor * float("nan")
        elif kind == "half":
            state[victim] = tensor.half()
        save_file(state, place / "model.safetensors", {"format": "pt"})
        status = main(["convert", str(place), str(out), "--json"])
        assert status == (0 if kind == "half" else 2 if kind == "reshape" else 1)
        assert out.exists() == (status == 0)
        kind = "`dpzoo convert` of a checkpoint with a tensor changed or gone"
        count(kind, WHOLE if status == 0 else CLEAR)


# --- accounts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@settings(max_examples=examples(70))
@given(damage=damages(), again=damages())
def test_a_ledger_with_any_damage_is_refused_or_says_what_it_said(
    damage: Callable[[bytes], bytes], again: Callable[[bytes], bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        ledger = Ledger(path)
        for step in range(1, 5):
            ledger.begin("run", step, noise_multiplier=1.0, sample_rate=0.1)
            ledger.commit("run", step, f"{step:02x}")
        head, paid = ledger.head, ledger.paid("run")
        path.write_bytes(again(damage(path.read_bytes())))
        try:
            other = Ledger(path)
            other.require("run", head)
            found = other.paid("run")
        except InputError:
            event("refused")
            count("a ledger with any damage", CLEAR)
            return
        assert found == paid
        count("a ledger with any damage", WHOLE)


@settings(max_examples=examples(40))
@given(damage=damages(), file=st.sampled_from(["privacy.json", "privacy_random_state.pt"]))
def test_a_checkpoints_account_with_any_damage_is_refused_or_says_what_it_said(
    damage: Callable[[bytes], bytes], file: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_random_state({"key": "ab"}, place)
        history = [(1.0, 0.1, 5)]
        state = PrivacyState(
            "run", 5, "rdp", history, 1.5, 1e-5, 1.0, {"lr": 0.1}, "9:ab", digests(place)
        )
        state.save(place)
        (place / file).write_bytes(damage((place / file).read_bytes()))
        try:
            found = PrivacyState.load(place)
        except InputError:
            event("refused")
            count("a checkpoint's privacy state with any damage", CLEAR)
            return
        assert found == state
        count("a checkpoint's privacy state with any damage", WHOLE)
