"""PEFT adapters: exact in every mode, and interchangeable with those of the stock model.

The oracle is the stock model with the same adapter, each row alone. Adapters are random: PEFT starts
with B = 0, where A has no gradient and a swapped or transposed matrix changes nothing.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.registry import class_by_name, stock_class
from tests.modes import ALL_MODES, Step, assert_model_step_is_exact, engine_of
from tests.support import (
    FAMILY,
    NAMES,
    ROWS,
    TASK,
    assert_bit_equal,
    assert_same_outputs,
    batch_for,
    oracle_gradients,
    row_loss,
    row_of,
    snapshot,
    stock_model,
    without_labels,
)

pytestmark = [
    # PEFT, on stock GPT-2 and wherever an adapter goes from Conv1D to Linear or back: tested below.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]

PEFT_TASK = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
}
"""PEFT's names of tasks; with one, PEFT itself adds the head to ``modules_to_save``."""

DAILY = [
    *(n for n in NAMES if TASK[n] in ("sequence-classification", "token-classification")),
    "GPT2LMHeadModel",
    "BertForMaskedLM",
]

SWAPPED = [*(n for n in NAMES if TASK[n] == "sequence-classification"), "GPT2LMHeadModel"]
"""The classes whose adapters travel between zoo and stock model below."""


def lora(name: str, **options: Any) -> LoraConfig:
    """LoRA with PEFT's default target modules; DistilBERT, which PEFT has none for, like BERT's."""
    if FAMILY[name] == "distilbert":
        options.setdefault("target_modules", ["q_lin", "v_lin"])
        if TASK[name] == "sequence-classification":
            options.setdefault("modules_to_save", ["pre_classifier"])
    options.setdefault("lora_dropout", 0.0)
    return LoraConfig(task_type=PEFT_TASK.get(TASK[name]), r=3, **copy.deepcopy(options))


def randomize_adapter(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)


def trainable(model: torch.nn.Module) -> list[str]:
    return [key for key, parameter in model.named_parameters() if parameter.requires_grad]


def stock_and_converted(name: str, **options: Any) -> tuple[Any, Any]:
    """The stock model and the dpzoo model, float64, with the same random adapter."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock)).to("cpu")
    adapted = [get_peft_model(model, lora(name, **options)) for model in (stock, zoo)]
    randomize_adapter(adapted[0])
    values = dict(adapted[0].named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for key, parameter in adapted[1].named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[key])
    return adapted[0].eval(), adapted[1].eval()


def assert_pair_is_exact(
    name: str, mode: str, stock: Any, zoo: Any, wrap_model: bool = True
) -> None:
    batch = batch_for(name)
    assert_same_outputs(zoo, stock, without_labels(batch), 1e-12)
    wanted = oracle_gradients(name, stock, batch)
    assert_model_step_is_exact(name, mode, batch, zoo, wanted, wrap_model=wrap_model)


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize(
    "name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_default_targets_are_exact(name: str, mode: str) -> None:
    """A wrong norm or sum of A, B or a saved head would clip or train adapters wrongly."""
    stock, zoo = stock_and_converted(name)
    names = trainable(zoo)
    assert sum("lora_A" in key for key in names) == sum("lora_B" in key for key in names) > 0
    if PEFT_TASK.get(TASK[name]) not in (None, "CAUSAL_LM"):
        assert any("modules_to_save" in key for key in names)
    assert names == trainable(stock)
    assert_pair_is_exact(name, mode, stock, zoo)


@pytest.mark.parametrize("mode", ["functorch", "ew"])
@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("GPT2ForSequenceClassification", "BertForMaskedLM")
        else pytest.param(n, marks=pytest.mark.slow)
        for n in DAILY
    ],
)
def test_functorch_and_expanded_weights_are_exact_too(name: str, mode: str) -> None:
    """The two slow modes would disagree with the fast ones if an adapter layer were misread."""
    assert_pair_is_exact(name, mode, *stock_and_converted(name))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", SWAPPED)
def test_unwrapped_models_are_exact(name: str, mode: str) -> None:
    """With wrap_model=False Opacus' hooks must find the layers inside PEFT's wrapper."""
    assert_pair_is_exact(name, mode, *stock_and_converted(name), wrap_model=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "own copy of a tied table": {"modules_to_save": ["wte", "word_embeddings"]},
    "own copy of a tied head": {"modules_to_save": ["lm_head", "decoder"]},
    "trained biases": {"bias": "all"},
    "biases of B": {"lora_bias": True},
    "tied head as target": {"target_modules": ["lm_head", "decoder"]},
    "norms saved": {"modules_to_save": ["ln_1", "ln_f", "LayerNorm"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        pytest.param(
            options,
            mode,
            marks=() if i < 2 and mode in ("hooks", "ghost", "bk") else pytest.mark.slow,
        )
        for i, options in enumerate(OPTIONS)
        for mode in ALL_MODES
    ],
)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_other_targets_are_exact(name: str, mode: str, options: str) -> None:
    """PEFT copies or wraps parts that dpzoo gives a type to; a lost type or tie shows here."""
    assert_pair_is_exact(name, mode, *stock_and_converted(name, **OPTIONS[options]))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_checkpointed_adapters_are_exact(name: str, mode: str) -> None:
    """Nothing below the first adapter needs a gradient: recomputation must not lose the rest."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    zoo.gradient_checkpointing_enable({"use_reentrant": mode != "bk"})
    adapted = get_peft_model(stock, lora(name)), get_peft_model(zoo, lora(name))
    randomize_adapter(adapted[0])
    adapted[1].load_state_dict(adapted[0].state_dict())
    assert_pair_is_exact(name, mode, adapted[0].eval(), adapted[1].eval())


DORA = {
    "hooks": (TypeError, r"DoraLinearLayer.forward\(\) missing 4 required keyword-only"),
    "functorch": (TypeError, r"DoraLinearLayer.forward\(\) missing 4 required keyword-only"),
    "ew": (RuntimeError, "batch size"),
    "ghost": (NotImplementedError, "Parameter tying is not supported with Ghost Clipping"),
}
TABLE = {
    "hooks": (ValueError, "Per sample gradient is not initialized"),
    "functorch": (ValueError, "Per sample gradient is not initialized"),
    "ew": (RuntimeError, "Expanded Weights encountered but cannot handle function"),
    "ghost": (AttributeError, "has no attribute '_norm_sample'"),
}


@pytest.mark.parametrize(
    ("options", "refusals", "mode"),
    [
        *(pytest.param({"use_dora": True}, DORA, mode, id=f"dora-{mode}") for mode in DORA),
        *(  # LoRA of an embedding: bare parameters
            pytest.param(
                {"target_modules": ["wte", "c_attn"]},
                TABLE,
                mode,
                id=f"table-{mode}",
            )
            for mode in TABLE
        ),
    ],
)
def test_what_opacus_cannot_follow_is_an_error(
    options: dict[str, Any], refusals: dict[str, tuple[type[Exception], str]], mode: str
) -> None:
    """DoRA calls a layer on an identity matrix, LoRA of a table none: neither may pass silently."""
    name = "GPT2LMHeadModel"
    _, zoo = stock_and_converted(name, **options)
    names = trainable(zoo)
    batch = batch_for(name)
    unused = {key: torch.zeros(ROWS, 1) + 1 for key in names}
    error, message = refusals[mode]
    with pytest.raises(error, match=message):
        assert_model_step_is_exact(name, mode, batch, zoo, unused)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"target_modules": ["wte", "c_attn"]}],
    ids=["dora", "table"],
)
def test_what_opacus_cannot_follow_is_exact_in_bk(options: dict[str, Any]) -> None:
    """It goes by the uses of a parameter, whatever layer holds it."""
    name = "GPT2LMHeadModel"
    assert_pair_is_exact(name, "bk", *stock_and_converted(name, **options))


def test_peft_has_no_default_targets_for_distilbert() -> None:
    """Why `lora` names them here: the stock model is refused just the same."""
    name = "DistilBertForSequenceClassification"
    for model in (stock_model(name), dpzoo.convert(stock_model(name))):
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))


class Products(TorchDispatchMode):
    """The shapes of all matrix products, rows of a batch of products left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.add(tuple(result.shape[-2:]))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_bk_enters_no_use_of_a_frozen_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and sums of frozen weights would cost what LoRA is there to save."""
    zoo = get_peft_model(dpzoo.convert(stock_model(name)), lora(name))
    shapes: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    for p in zoo.parameters():
        if p.ndim == 2 and len(p) > 1:
            shapes[p.requires_grad] |= {tuple(p.shape), tuple(p.shape)[::-1]}
    entered: set[torch.Tensor] = set()
    add = FactorStore.add

    def spied(self: FactorStore, parameter: torch.Tensor, *args: Any) -> None:
        entered.add(parameter)
        add(self, parameter, *args)

    monkeypatch.setattr(FactorStore, "add", spied)
    # Its forward passes of other rows have products of other shapes.
    monkeypatch.setattr("dpzoo.clipping.module.dependent_outputs", lambda *_, **__: set())
    step = Step(name, zoo, "bk")
    with Products() as products:
        step.backward(batch_for(name))
    assert entered <= {p for p in zoo.parameters() if p.requires_grad}
    assert entered >= {p for key, p in zoo.named_parameters() if "lora" in key}
    assert shapes[False] - shapes[True]
    assert not products.shapes & (shapes[False] - shapes[True])

    # With nothing frozen the same products are there: the look-out above can see.
    step.engine.cleanup()
    zoo.requires_grad_(True)
    step = Step(name, zoo, "bk")
    with Products() as products:
        step.backward(batch_for(name))
    assert products.shapes & (shapes[False] - shapes[True])


# --- from zoo to stock and back -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
@pytest.mark.parametrize("name", SWAPPED)
def test_merged_weights_export_to_stock(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A merge into a layer that is stored transposed would be exported wrong without a complaint."""
    _, zoo = stock_and_converted(name, **options)
    inputs = without_labels(batch_for(name))
    merged = copy.deepcopy(zoo).merge_and_unload()
    assert type(merged) is class_by_name(name)
    assert_same_outputs(merged, zoo, inputs, 1e-12)
    stock = dpzoo.to_transformers(merged)
    assert type(stock) is stock_class(class_by_name(name))
    assert_same_outputs(stock, zoo, inputs, 1e-12)
    merged.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same_outputs(loaded, zoo, inputs, 1e-12)
    assert_same_outputs(dpzoo.convert(loaded), zoo, inputs, 1e-12)


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
@pytest.mark.parametrize("trained_on", ["zoo", "stock"])
@pytest.mark.parametrize("name", SWAPPED)
def test_an_adapter_on_disk_fits_both_models(
    name: str, trained_on: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """An adapter that loads onto the other model with other values would be silently useless."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    source, target = (zoo, stock) if trained_on == "zoo" else (stock, zoo)
    inputs = without_labels(batch_for(name))
    adapted = get_peft_model(copy.deepcopy(source), lora(name, **options))
    randomize_adapter(adapted)
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        moved = adapted(**inputs).logits - source(**inputs).logits
    assert float(moved.abs().max()) > 0.1  # or equal outputs would say nothing
    loaded = PeftModel.from_pretrained(target, tmp_path)
    assert_same_outputs(loaded, adapted, inputs, 1e-12)
    assert_same_outputs(loaded.merge_and_unload(), adapted, inputs, 1e-12)


def test_fan_in_fan_out_follows_the_layer_that_the_adapter_meets(tmp_path: Path) -> None:
    """Stock GPT-2's Conv1D saves True, the zoo's Linear False; PEFT corrects both, and says so."""
    name = "GPT2LMHeadModel"
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    for model, saved in ((stock, True), (zoo, False)):
        folder = tmp_path / str(saved)
        get_peft_model(copy.deepcopy(model), lora(name)).save_pretrained(folder)
        assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is saved
    with pytest.warns(UserWarning, match="set to True but the target module is `torch.nn.Linear`"):
        on_zoo = PeftModel.from_pretrained(zoo, tmp_path / "True")
    with pytest.warns(UserWarning, match="set to False but the target module is `Conv1D`"):
        on_stock = PeftModel.from_pretrained(stock, tmp_path / "False")
    for model, corrected in ((on_zoo, False), (on_stock, True)):
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        assert layer.fan_in_fan_out is corrected
        assert layer.get_delta_weight("default").shape == layer.weight.shape


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
@pytest.mark.parametrize("name", SWAPPED)
def test_state_dicts_of_adapted_models_are_interchangeable(
    name: str, options: dict[str, Any]
) -> None:
    """A training checkpoint of the adapted model must load in either direction, base included."""
    stock, zoo = stock_and_converted(name, **options)
    first, second = snapshot(stock), snapshot(zoo)
    assert_bit_equal(second, first)
    with torch.no_grad():
        for model in (stock, zoo):
            for parameter in model.parameters():
                parameter.zero_()
    zoo.load_state_dict(first, strict=True)
    stock.load_state_dict(second, strict=True)
    assert_same_outputs(zoo, stock, without_labels(batch_for(name)), 1e-12)


# --- transformers' own adapter interface ------------------------------------------------------------

TOO_OLD = "The version of PEFT you are using is not compatible"
"""What transformers 5.24 says to PEFT 0.21, which is the newest there is."""


def add_adapter(model: Any, config: LoraConfig) -> None:
    """``model.add_adapter``, or the call that it makes where it does not like PEFT's version."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if TOO_OLD not in str(error):
            raise
        inject_adapter_in_model(config, model)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_add_adapter_is_exact(name: str, mode: str) -> None:
    """PeftAdapterMixin puts the layers in place; the model, unwrapped, keeps class and names."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    head = ["classifier"] if TASK[name] == "sequence-classification" else None
    for model in (stock, zoo):
        add_adapter(model, lora(name, modules_to_save=head))
    randomize_adapter(stock)
    zoo.load_state_dict(stock.state_dict())
    assert type(zoo) is class_by_name(name)
    assert trainable(zoo) == trainable(stock)
    assert_pair_is_exact(name, mode, stock.eval(), zoo.eval())


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_add_adapter_saves_what_the_stock_model_loads(name: str, tmp_path: Path) -> None:
    """save_pretrained then writes the adapter alone; it must mean the same to load_adapter."""
    stock = stock_model(name)
    zoo = dpzoo.convert(copy.deepcopy(stock))
    other = dpzoo.convert(copy.deepcopy(stock))
    head = ["classifier"] if TASK[name] == "sequence-classification" else None
    try:
        stock_model(name).add_adapter(lora(name, modules_to_save=head))
    except ValueError:  # then the zoo's model says the same
        with pytest.raises(ValueError, match=TOO_OLD):
            zoo.add_adapter(lora(name, modules_to_save=head))
        return
    zoo.add_adapter(lora(name, modules_to_save=head))
    randomize_adapter(zoo)
    zoo.eval().save_pretrained(tmp_path)
    inputs = without_labels(batch_for(name))
    for model in (stock, other):
        model.load_adapter(str(tmp_path))
        assert_same_outputs(model.eval(), zoo, inputs, 1e-12)
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"with an adapter at '.*merge or remove"):
        dpzoo.to_transformers(zoo)


# --- the effect -------------------------------------------------------------------------------------


def row_loss_of(name: str, model: Any, batch: dict[str, torch.Tensor], i: int) -> torch.Tensor:
    """The stock model's loss of one row, alone."""
    row = row_of(batch, i)
    return row_loss(name, model(**without_labels(row)), row)


@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", SWAPPED)
def test_a_privately_trained_adapter_has_moved_and_reproduces_its_loss(
    name: str, mode: str, wrap_model: bool, tmp_path: Path
) -> None:
    """Adapters that never moved, or that come back from disk as something else, are lost runs."""
    stock = stock_model(name, torch.float32)
    adapted = get_peft_model(
        dpzoo.convert(copy.deepcopy(stock)).to("cpu"), lora(name, lora_dropout=0.1)
    ).train()
    before = snapshot(adapted)
    moving = set(trainable(adapted))
    made = engine_of(mode).make_private(
        module=adapted,
        optimizer=torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02),
        criterion=dpzoo.ModelLoss(),
        data_loader=DataLoader(list(range(ROWS)), batch_size=ROWS),
        noise_multiplier=0.3,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        wrap_model=wrap_model,
    )
    model = made[0] if wrap_model else adapted
    criterion = made[2] if mode in ("ghost", "bk") else dpzoo.ModelLoss()
    batch = batch_for(name)
    for _ in range(3):
        criterion(model(**batch)).backward()
        made[1].step()
        made[1].zero_grad()
    made[0].to_standard_module() if wrap_model else made[0].cleanup()

    for key, value in snapshot(adapted).items():
        assert bool(value.isfinite().all()), key
        assert torch.equal(value, before[key]) is (key not in moving), key
    adapted.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        untrained = dpzoo.convert(copy.deepcopy(stock))(**batch).loss
        trained = adapted(**batch).loss
        reloaded = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path)
        rows = [row_loss_of(name, reloaded, batch, i) for i in range(ROWS)]
    assert abs(float(trained - untrained)) > 1e-2
    assert float(torch.stack(rows).mean()) == pytest.approx(float(trained), rel=1e-5)
