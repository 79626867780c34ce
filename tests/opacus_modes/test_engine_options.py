"""The rest of PrivacyEngine's interface: unwrapped models, reductions, clippings, criteria."""

import copy
import subprocess
import sys

import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpzoo
from tests.modes import ALL_MODES, MODES, Step, assert_step_is_exact, engine_of
from tests.support import (
    NAMES,
    ROWS,
    TASK,
    VOCAB,
    batch_for,
    largest_error,
    oracle_gradients,
    others_slow,
    stock_model,
    without_labels,
)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("name", NAMES)
def test_unwrapped_models(name: str, mode: str) -> None:
    """wrap_model=False: the model keeps its class, and with it generate, save_pretrained, ..."""
    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), wrap_model=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_sum_reduction(name: str, mode: str) -> None:
    assert_step_is_exact(name, mode, batch_for(name), stock_model(name), reduction="sum")


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("name", NAMES)
def test_per_layer_clipping(name: str, mode: str) -> None:
    """Each parameter clipped by itself, tied ones as one."""
    stock = stock_model(name)
    batch = batch_for(name)
    wanted = oracle_gradients(name, stock, batch)
    model = dpzoo.convert(stock)
    names = [key for key, _ in model.named_parameters()]
    clips = [float(wanted[key].flatten(1).norm(dim=1).median()) + 1e-3 for key in names]
    step = Step(name, model, mode, max_grad_norm=clips, clipping="per_layer")
    step.backward(batch)
    got = step.gradient()
    for key, clip in zip(names, clips, strict=True):
        norms = wanted[key].flatten(1).norm(dim=1)
        factors = (clip / (norms + 1e-6)).clamp(max=1.0)
        total = torch.einsum("n,n...->...", factors, wanted[key])
        assert largest_error(got[key] * ROWS, total) <= 1e-9, key


def test_ghost_mode_refuses_per_layer_clipping() -> None:
    """Opacus' own refusal; nothing falls back to flat clipping."""
    model = dpzoo.convert(stock_model("BertForSequenceClassification"))
    with pytest.raises(ValueError, match="Unsupported combination of parameters"):
        Step("BertForSequenceClassification", model, "ghost", clipping="per_layer")


@pytest.mark.parametrize("mode", others_slow(ALL_MODES, ["bk", "ghost"]))
def test_make_private_with_epsilon(mode: str) -> None:
    name = "DistilBertForSequenceClassification"
    model = dpzoo.convert(stock_model(name)).train()
    engine = engine_of(mode)
    batch = batch_for(name)
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=dpzoo.ModelLoss(),
        data_loader=DataLoader(TensorDataset(torch.zeros(ROWS, 1)), batch_size=ROWS // 2),
        target_epsilon=8.0,
        target_delta=1e-2,
        epochs=1,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    private, optimizer = made[0], made[1]
    criterion = made[2] if mode in ("ghost", "bk") else dpzoo.ModelLoss()
    if mode == "bk":
        optimizer.draws.begin(ROWS)  # which its loader does, for the rows that it draws
    ids = batch.pop("input_ids")
    criterion(private(ids, **batch)).backward()
    optimizer.step()
    assert 0 < engine.get_epsilon(1e-2) <= 8.0


@pytest.mark.parametrize("mode", ["ghost", "bk"])
@pytest.mark.parametrize("name", [n for n in NAMES if TASK[n] == "sequence-classification"])
def test_cross_entropy_on_logits(name: str, mode: str) -> None:
    """The criterion of Opacus' own tutorials keeps working, and says the same as ModelLoss."""
    stock, batch = stock_model(name), batch_for(name)
    gradients = []
    for criterion in (dpzoo.ModelLoss(), nn.CrossEntropyLoss()):
        step = Step(name, dpzoo.convert(copy.deepcopy(stock)), mode, max_grad_norm=0.5)
        step.criterion.criterion = criterion
        if isinstance(criterion, dpzoo.ModelLoss):
            loss = step.criterion(step.wrapped(**batch))
        else:
            loss = step.criterion(step.wrapped(**without_labels(batch)).logits, batch["labels"])
        loss.backward()
        gradients.append(step.gradient())
    for key, value in gradients[0].items():
        assert largest_error(gradients[1][key], value) <= 1e-12, key


@pytest.mark.parametrize("mode", ["ghost", "bk"])
def test_cross_entropy_with_shape_for_language_models(mode: str) -> None:
    """Opacus' ``shape=`` form: flat logits and labels, rows put together again by the criterion."""
    name = "BertForMaskedLM"
    stock, batch = stock_model(name), batch_for(name)
    gradients = []
    for flat in (False, True):
        step = Step(name, dpzoo.convert(copy.deepcopy(stock)), mode, max_grad_norm=0.5)
        if flat:
            step.criterion.criterion = nn.CrossEntropyLoss()
            logits = step.wrapped(**without_labels(batch)).logits
            step.criterion(
                logits.reshape(-1, VOCAB), batch["labels"].reshape(-1), shape=logits.shape
            ).backward()
        else:
            step.criterion.criterion = dpzoo.ModelLoss()
            step.criterion(step.wrapped(**batch)).backward()
        gradients.append(step.gradient())
    for key, value in gradients[0].items():
        assert largest_error(gradients[1][key], value) <= 1e-12, key


def test_model_loss_reductions_and_refusals() -> None:
    name = "GPT2DoubleHeadsModel"
    outputs = dpzoo.convert(stock_model(name))(**batch_for(name))
    rows = dpzoo.ModelLoss(reduction="none")(outputs)
    assert rows.shape == (ROWS,)
    assert torch.equal(rows, outputs.loss_per_sample + outputs.mc_loss_per_sample)
    assert largest_error(dpzoo.ModelLoss()(outputs), rows.mean()) <= 1e-12
    assert largest_error(dpzoo.ModelLoss(reduction="sum")(outputs), rows.sum()) <= 1e-12
    with pytest.raises(dpzoo.InputError, match="reduction='average', wanted 'mean', 'sum' or"):
        dpzoo.ModelLoss(reduction="average")
    unlabelled = dpzoo.convert(stock_model(name))(**without_labels(batch_for(name)))
    with pytest.raises(dpzoo.InputError, match=r"without loss_per_sample.*Pass labels"):
        dpzoo.ModelLoss()(unlabelled)


def test_importing_dpzoo_leaves_opacus_registry_of_others_alone() -> None:
    """The samplers of every class that is not dpzoo's are the same objects before and after."""
    code = (
        "from opacus.grad_sample import GradSampleModule as G\n"
        "from opacus.grad_sample import GradSampleModuleFastGradientClipping as F\n"
        "tables = (G.GRAD_SAMPLERS, F.GRAD_SAMPLERS, F.NORM_SAMPLERS)\n"
        "before = [dict(table) for table in tables]\n"
        "names = [set(vars(c)) for c in (G, F)]\n"
        "from dpzoo import *\n"
        "for old, new in zip(before, tables):\n"
        "    assert all(new[key] is value for key, value in old.items())\n"
        "    added = {key.__module__ for key in new.keys() - old.keys()}\n"
        "    assert added and all(module.startswith('dpzoo.') for module in added), added\n"
        "assert names == [set(vars(c)) for c in (G, F)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_adaptive_clipping_runs() -> None:
    """AdaClip changes C from the norms it sees; the zoo's gradients are what it sees."""
    name = "BertForSequenceClassification"
    options = {
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.1,
        "unclipped_num_std": 1.0,
    }
    model = dpzoo.convert(stock_model(name)).train()
    private, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(list(range(ROWS)), batch_size=ROWS),
        noise_multiplier=0.8,
        max_grad_norm=1.0,
        poisson_sampling=False,
        clipping="adaptive",
        **options,
    )
    before = optimizer.max_grad_norm
    private(**batch_for(name)).loss.backward()
    optimizer.step()
    assert optimizer.max_grad_norm != before


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if TASK[name] != "base"])
def test_an_ordinary_loss_is_refused_in_ghost_mode_and_bk(name: str, wrap_model: bool) -> None:
    """Opacus would take the step unclipped; in hooks mode the same line is right."""
    batch = batch_for(name)
    step = Step(name, dpzoo.convert(stock_model(name)), "bk", wrap_model=wrap_model)
    with pytest.raises(dpzoo.InputError, match=r"An ordinary loss was backpropagated.*'bk'"):
        step.wrapped(**batch).loss.backward()
    step = Step(name, dpzoo.convert(stock_model(name)), "ghost", wrap_model=wrap_model)
    with pytest.raises(
        dpzoo.InputError, match=r"backpropagated in grad_sample_mode='ghost', where"
    ):
        step.wrapped(**batch).loss.backward()
    hooks = Step(name, dpzoo.convert(stock_model(name)), "hooks", wrap_model=wrap_model)
    output = hooks.wrapped(**batch)
    if TASK[name] != "double-heads":
        output.loss.backward()


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "GPT2LMHeadModel"])
def test_the_noise_multiplier_is_the_noise_of_every_parameter(name: str, mode: str) -> None:
    """A tied or unused parameter without noise, or with two draws, is a release in the clear."""
    sigma, clip, steps = 1.7, 0.3, 10
    model = dpzoo.convert(stock_model(name))
    step = Step(name, model, mode, max_grad_norm=clip, reduction="sum")
    batch = batch_for(name)
    noise: dict[str, list[torch.Tensor]] = {}
    for _ in range(steps):
        silent, loud = [], []
        for sums, step.optimizer.noise_multiplier in ((silent, 0.0), (loud, sigma)):
            start = {key: p.detach().clone() for key, p in model.named_parameters()}
            step.backward(batch)
            sums.append(step.gradient())
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.copy_(start[key])
        for key, value in loud[0].items():
            noise.setdefault(key, []).append((value - silent[0][key]).flatten())
    for key, values in noise.items():
        drawn = torch.stack(values) / (sigma * clip)
        count = drawn.numel()
        assert float(drawn.square().mean()) == pytest.approx(1, abs=6 * (2 / count) ** 0.5), key
        assert float(drawn.mean()) == pytest.approx(0, abs=6 / count**0.5), key


def test_secure_mode_without_opacus_library_is_refused_by_opacus_and_had_from_dpzoo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An ordinary generator would be a silent downgrade; dpzoo's noise has its own secret key."""
    monkeypatch.setitem(sys.modules, "torchcsprng", None)
    with pytest.raises(ImportError, match="torchcsprng"):
        PrivacyEngine(secure_mode=True)
    dpzoo.PrivacyEngine(secure_mode=True)
