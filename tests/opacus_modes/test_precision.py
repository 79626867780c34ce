"""Reduced precision under an unmodified Opacus: what is float32, how exact it is, and what is not.

Three roundings have to be told apart:

- of the function: bfloat16 forward and backward passes compute another gradient than float32 does, by
  2^-8 an operation. `FUNCTION` bounds it for two layers; no sampler can do anything about it;
- of the norm: how far a row's norm is from that of the gradient which the bfloat16 passes computed.
  `NORM` is float32's rounding of it. In Opacus' own samplers of Linear it is bfloat16's, without bound
  where the tokens of a row cancel;
- of the sum: float32 where the parameters are and the mode is hooks. Ghost mode's second backward pass
  is autograd's, which rounds every weight gradient to the dtype of the matrix product; and Opacus adds up
  rows and noise in the dtype of the parameter. That cannot be had from an unmodified Opacus:
  parameters in bfloat16 are warned about, and grad_sample_mode="bk" of dpzoo's engine does it right.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dpzoo
from dpzoo.layers import LMHead
from dpzoo.layers.precision import UPCAST, UpcastLayerNorm, UpcastLinear, upcast_samplers
from tests.modes import Step, engine_of, oracle_norms
from tests.support import (
    NAMES,
    TASK,
    batch_for,
    largest_error,
    oracle_gradients,
    row_of,
    stock_model,
)

FUNCTION = 0.1
"""Of a row's norm, relative: a dozen roundings of 2^-8 in a row of products, forward and back."""

NORM = 1e-5
"""Relative: float32 sums of some hundred exact products; 2^-24 each, and a square root."""

INPUT = 2.0**-8
"""Relative: a rounding to bfloat16 of every number of a layer's input."""

BF16 = torch.bfloat16
WARNING = "trains parameters of torch.bfloat16 under Opacus"

CLASSES = [
    "BertForSequenceClassification",
    "RobertaForMultipleChoice",
    "DistilBertForMaskedLM",  # tied, with a bias
    "GPT2LMHeadModel",  # tied
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
]


def reduced(stock: Any, kind: str) -> Any:
    """The dpzoo model: float32 for autocast, bfloat16 parameters otherwise."""
    model = dpzoo.convert(copy.deepcopy(stock))
    return model.to(BF16) if kind == "weights" else model


def run(step: Step, batch: dict[str, torch.Tensor], kind: str, *, inside: bool = False) -> None:
    """Forward under autocast if the kind says so; backward outside of it, or inside."""
    criterion = step.criterion.criterion if step.makes_criterion else step.criterion
    criterion.batch = batch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{WARNING}")
        with torch.autocast("cpu", dtype=BF16, enabled=kind == "autocast"):
            loss = step.criterion(step.wrapped(**batch))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()


class Recorder:
    """The inputs and output gradients of a model's layers, and their exact per-sample norms."""

    def __init__(self, model: nn.Module) -> None:
        self.uses: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self._inputs: dict[nn.Module, torch.Tensor] = {}
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda grad: self.uses.append((module, x, grad)))

    def squared_norms(self, rows: int) -> dict[nn.Module, torch.Tensor]:
        """Module -> squared norms of its weight's gradients, (rows,), in float64, gradients times rows.

        Of a mean loss's backward pass; the first one, if there were two.
        """
        found: dict[nn.Module, torch.Tensor] = {}
        for module, x, grad in self.uses:
            if module in found:
                continue
            x = x.to(grad.dtype) if isinstance(module, nn.Linear) else x.float()
            x, grad = x.double(), grad.double() * rows
            if isinstance(module, nn.LayerNorm):
                x = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
                gradients = (x * grad).reshape(rows, -1, x.shape[-1]).sum(1)
            else:
                gradients = torch.einsum("n...o,n...i->noi", grad, x)
            found[module] = gradients.flatten(1).square().sum(1)
        return found


def samples(model: nn.Module, mode: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, parameter in model.named_parameters():
        if (
            mode == "bk"
        ):  # keeps the norm over all parameters only; float32 sums are left of the rows
            yield key, parameter.summed_grad
        else:
            yield key, parameter._norm_sample if mode == "ghost" else parameter.grad_sample


# --- norms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", CLASSES)
def test_norms_are_float32(name: str, mode: str, kind: str) -> None:
    """A norm in bfloat16 is off by the rounding of its products: rows would be clipped by chance."""
    stock = stock_model(name, torch.float32)
    batch = batch_for(name, dtype=torch.float32)
    wanted = oracle_gradients(name, copy.deepcopy(stock), batch)
    model = reduced(stock, kind)
    recorder = Recorder(model)
    step = Step(name, model, mode)
    run(step, batch, kind)

    for key, sample in samples(model, mode):
        assert sample.dtype == torch.float32, key
    got = step.norms()
    assert got.dtype == torch.float32

    # Against the gradient that the passes computed, layer by layer.
    checked = 0
    for module, squared in recorder.squared_norms(len(got)).items():
        if type(module) in (UpcastLinear, UpcastLayerNorm):
            sample = dict(samples(module, mode))["weight"]
            norm = sample if mode == "ghost" else sample.flatten(1).norm(dim=1)
            scale = squared.sqrt().max()
            assert largest_error(norm / scale, squared.sqrt() / scale) <= NORM, module
            checked += 1
    assert checked > 10
    # Against float32 passes.
    names = [key for key, _ in model.named_parameters()]
    norms = oracle_norms(wanted, names)
    assert bool(((got - norms).abs() <= FUNCTION * norms).all()), (got, norms)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_tied_head_is_differentiated_at_the_input_that_it_rounded(
    mode: str, inside: bool
) -> None:
    """Autocast casts the head's float32 input; a gradient at the input itself is of no sum's row."""
    name = "GPT2LMHeadModel"
    batch = batch_for(name, embeds=True, dtype=torch.float32)
    del batch["token_type_ids"]  # now the head is the table's only use
    model = reduced(stock_model(name, torch.float32), "autocast")
    recorder = Recorder(model)
    step = Step(name, model, mode)
    run(step, batch, "autocast", inside=inside)
    head = model.get_output_embeddings()
    assert type(head) is LMHead
    sample = dict(samples(head, mode))["weight"]
    norm = sample if mode == "ghost" else sample.flatten(1).norm(dim=1)
    wanted = recorder.squared_norms(len(norm))[head].sqrt()
    assert largest_error(norm / wanted.max(), wanted / wanted.max()) <= NORM


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", [name for name in NAMES if TASK[name] == "base"])
def test_norms_of_bare_models_are_float32_too(name: str, mode: str) -> None:
    """They have no head that could see to it, and no loss of their own."""
    step = Step(name, reduced(stock_model(name, torch.float32), "autocast"), mode)
    run(step, batch_for(name, dtype=torch.float32), "autocast")
    assert step.norms().dtype == torch.float32
    for key, sample in samples(step.model, mode):
        assert sample.dtype == torch.float32, key


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("name", CLASSES)
def test_hooks_ghost_mode_and_bk_agree(name: str, kind: str) -> None:
    """Three ways to one norm: a head that rounded its input in one of them only would tell them apart."""
    stock = stock_model(name, torch.float32)
    batch = batch_for(name, dtype=torch.float32)
    norms = []
    for mode in ("hooks", "ghost", "bk"):
        step = Step(name, reduced(stock, kind), mode)
        run(step, batch, kind)
        norms.append(step.norms())
        assert norms[-1].dtype == torch.float32
        # bk takes a layer's float32 input as it came, where autocast's product had it rounded.
        tolerance = INPUT if (mode, kind) == ("bk", "autocast") else NORM
        assert largest_error(norms[0] / norms[-1], torch.ones_like(norms[-1])) <= tolerance, mode


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", CLASSES)
def test_backward_under_autocast_changes_nothing(name: str, mode: str) -> None:
    """Many loops call backward() inside the context; the samplers' products would be rounded there."""
    stock = stock_model(name, torch.float32)
    batch = batch_for(name, dtype=torch.float32)
    norms = []
    for inside in (False, True):
        step = Step(name, reduced(stock, "autocast"), mode)
        run(step, batch, "autocast", inside=inside)
        assert all(sample.dtype == torch.float32 for _, sample in samples(step.model, mode))
        norms.append(step.norms())
    assert largest_error(norms[0] / norms[1], torch.ones_like(norms[1])) <= NORM


def test_full_precision_and_models_outside_opacus_keep_their_classes() -> None:
    """The wide classes are for reduced precision under Opacus: nobody else should meet them."""
    name = "BertForSequenceClassification"
    batch = batch_for(name, dtype=torch.float32)
    alone = dpzoo.convert(stock_model(name, torch.float32)).train()
    with torch.autocast("cpu", dtype=BF16):
        alone(**batch).loss.backward()
    step = Step(name, dpzoo.convert(stock_model(name, torch.float32)), "hooks")
    step.backward(batch)
    for model in (alone, step.model):
        assert not any(type(module) in UPCAST.values() for module in model.modules())


def test_wide_layers_are_made_private_and_tied_like_plain_ones() -> None:
    """A model that was trained in bfloat16 once is wrapped again, exported and resized as before."""
    name = "BertForMaskedLM"
    stock = stock_model(name, torch.float32, tie_word_embeddings=False)
    model = dpzoo.convert(stock)
    batch = batch_for(name, dtype=torch.float32)
    step = Step(name, model, "ghost")
    run(step, batch, "autocast")
    assert type(model.get_output_embeddings()) is UpcastLinear
    step.engine.to_standard_module()
    again = Step(name, model, "hooks")
    again.backward(batch)
    assert again.norms().shape == (len(batch["labels"]),)
    again.engine.to_standard_module()
    wanted = model.eval()(**batch).logits
    assert largest_error(dpzoo.to_transformers(model)(**batch).logits, wanted) <= 1e-5
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert type(model.get_output_embeddings()) is LMHead


# --- contributions and sums -------------------------------------------------------------------------

EXCESS = {
    ("hooks", "autocast"): 1e-6,  # float32 throughout, after the backward pass
    ("hooks", "weights"): 0.01,  # Opacus rounds clip factor and sum to bfloat16: 2 x 2^-8
    ("ghost", "autocast"): 0.05,  # a second backward pass rounds anew: its gradient is another one
    ("ghost", "weights"): 0.05,
}
"""By how much a clipped row may exceed C, relative. That of 1e-6 is a bound; the others are
twice and more of what was seen on these models (0.3 %, 0.6 % and 0.3 %) and can be exceeded."""


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", CLASSES)
def test_what_a_clipped_row_contributes(name: str, mode: str, kind: str) -> None:
    """The sum holds each row at norm C; what it holds beyond is not covered by the noise."""
    clip = 1e-3
    batch = batch_for(name, dtype=torch.float32)
    step = Step(
        name,
        reduced(stock_model(name, torch.float32), kind),
        mode,
        max_grad_norm=clip,
        reduction="sum",
        rows=1,
    )
    for i in (1, 3):
        run(step, row_of(batch, i), kind)
        if mode == "hooks":
            step.optimizer.clip_and_accumulate()
        elif mode == "ghost":
            step.optimizer.accumulate()
        sums = [p.summed_grad for p in step.model.parameters()]
        narrow = kind == "weights" and mode != "bk"
        assert {value.dtype for value in sums} == {BF16 if narrow else torch.float32}
        norm = float(torch.stack([value.double().norm() for value in sums]).norm())
        if mode == "bk":  # clips by an upper bound of the norm: never above, and hardly below
            assert clip * (1 - 1e-5) <= norm <= clip * (1 + 1e-6)
        else:
            assert norm == pytest.approx(clip, rel=EXCESS[mode, kind])
        step.optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", CLASSES)
def test_clipped_sums_under_autocast_are_near_those_of_float32(name: str, mode: str) -> None:
    """The stated tolerance of a whole step: the function's rounding, and no more."""
    stock = stock_model(name, torch.float32)
    batch = batch_for(name, dtype=torch.float32)
    sums = []
    for kind in ("float32", "autocast"):
        step = Step(name, reduced(stock, kind), mode, max_grad_norm=1.0, reduction="sum")
        run(step, batch, kind)
        sums.append(torch.cat([value.flatten() for value in step.gradient().values()]))
        assert sums[-1].dtype == torch.float32
    assert float((sums[1] - sums[0]).norm()) <= FUNCTION * float(sums[0].norm())


class Scaled:
    """The sum of a row's outputs, each times a factor of its position: a gradient of any shape."""

    reduction = "sum"

    def __init__(self, factors: torch.Tensor) -> None:
        self.factors = factors

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        rows = (outputs.float() * self.factors).flatten(1).sum(1)
        return rows if self.reduction == "none" else rows.sum()


def private_layer(
    layer: nn.Linear, mode: str, factors: torch.Tensor, rows: int = 1, noise_multiplier: float = 0.0
) -> tuple[Any, Any, Any]:
    """One linear layer under Opacus with C = 1: the wrapped module, its optimizer, its criterion."""
    made = engine_of(mode).make_private(
        module=nn.Sequential(layer).train(),
        optimizer=torch.optim.SGD(layer.parameters(), lr=1.0),
        criterion=Scaled(factors),
        data_loader=DataLoader(list(range(rows)), batch_size=rows),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        loss_reduction="sum",
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    return made[0], made[1], made[2] if mode in ("ghost", "bk") else Scaled(factors)


@pytest.mark.parametrize("is_wide", [False, True], ids=["Opacus' sampler", "dpzoo's sampler"])
def test_a_row_whose_tokens_cancel_in_ghost_mode(is_wide: bool) -> None:
    """Opacus: inner products 1.0016 and 1 are one number in bfloat16; the norm 32 comes out as 0."""
    tokens = 64
    inputs = torch.cat([torch.ones(tokens, 1), 0.04 * torch.eye(tokens)], dim=1).unsqueeze(0)
    factors = 100.0 * torch.tensor([1.0, -1.0]).repeat(tokens // 2).view(-1, 1)
    model, optimizer, criterion = private_layer(nn.Linear(tokens + 1, 1), "ghost", factors)
    with torch.autocast("cpu", dtype=BF16):
        if is_wide:
            upcast_samplers(model)
        criterion(model(inputs)).backward()
    optimizer.accumulate()
    contribution = float(torch.cat([p.summed_grad.flatten() for p in optimizer.params]).norm())
    if is_wide:
        assert float(model.per_sample_gradient_norms) == pytest.approx(32.0, rel=1e-2)
        assert contribution == pytest.approx(1.0, rel=1e-2)
    else:
        assert float(model.per_sample_gradient_norms) == 0.0
        assert contribution == pytest.approx(32.0, rel=1e-2)


@pytest.mark.parametrize(
    ("mode", "kind", "moved"),
    [
        ("hooks", "autocast", 1.0),
        ("hooks", "weights", 2.0),
        ("ghost", "autocast", 2.0),
        ("ghost", "weights", 2.0),
        ("bk", "autocast", 1.0),
        ("bk", "weights", 1.0),
    ],
)
def test_one_row_of_259_moves_a_bfloat16_sum_by_twice_the_clipping_norm(
    mode: str, kind: str, moved: float
) -> None:
    """An Opacus fact: the sum of 259 rows of norm C is stored as 260 C, that of 258 as 258 C.

    In bk the sum is float32 whatever the parameters are.
    """
    sums = []
    for rows in (259, 258):
        layer = nn.Linear(1, 1, bias=False).to(BF16 if kind == "weights" else torch.float32)
        model, optimizer, criterion = private_layer(layer, mode, torch.ones(1), rows)
        with torch.autocast("cpu", dtype=BF16, enabled=kind == "autocast"):
            upcast_samplers(model) if kind == "autocast" else None
            loss = criterion(model(torch.ones(rows, 1, dtype=layer.weight.dtype)))
        loss.backward()
        if mode != "bk":  # whose backward pass has done it
            optimizer.clip_and_accumulate() if mode == "hooks" else optimizer.accumulate()
        sums.append(float(layer.weight.summed_grad))
    assert sums[0] - sums[1] == pytest.approx(moved, abs=1e-3)


@pytest.mark.parametrize(
    ("mode", "kind", "distinct"),
    [
        ("hooks", "autocast", 20),
        ("hooks", "weights", 1),
        ("bk", "autocast", 20),
        ("bk", "weights", 2),  # rounded after the noise, to 1280 C or to 1288 C
    ],
)
def test_noise_is_lost_in_a_bfloat16_sum(mode: str, kind: str, distinct: int) -> None:
    """An Opacus fact: at a sum of 1284 C bfloat16 has steps of 8 C, and noise of deviation C is gone."""
    rows, released = 1284, set()
    layer = nn.Linear(1, 1, bias=False).to(BF16 if kind == "weights" else torch.float32)
    model, optimizer, criterion = private_layer(layer, mode, torch.ones(1), rows, 1.0)
    for _ in range(20):
        with torch.autocast("cpu", dtype=BF16, enabled=kind == "autocast"):
            criterion(model(torch.ones(rows, 1, dtype=layer.weight.dtype))).backward()
        optimizer.step()
        released.add(float(layer.weight.grad))
        optimizer.zero_grad()
    assert len(released) >= distinct
    assert (len(released) > 1) == (distinct > 1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_narrow_parameters_are_warned_about(mode: str) -> None:
    """What an unmodified Opacus cannot do well is said, with what to do instead."""
    name = "GPT2LMHeadModel"
    step = Step(name, reduced(stock_model(name, torch.float32), "weights"), mode)
    with pytest.warns(UserWarning, match=rf"{WARNING}.*noise below a sum's last bit is lost.*'bk'"):
        step.backward(batch_for(name))


def test_the_engine_of_dpzoo_is_not_warned_about() -> None:
    """Its sums are float32 whatever the parameters are; a warning would send its users elsewhere."""
    name = "GPT2LMHeadModel"
    step = Step(name, reduced(stock_model(name, torch.float32), "weights"), "bk")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNING}")
        step.backward(batch_for(name))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_adapters_of_a_bfloat16_model_are_float32(mode: str) -> None:
    """PEFT keeps A and B in float32 over a frozen base of bfloat16: norms, sums and noise are too."""
    from peft import LoraConfig, get_peft_model

    name = "GPT2LMHeadModel"
    stock = stock_model(name, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNING}")
        model = get_peft_model(
            dpzoo.convert(stock).to(BF16), LoraConfig(task_type="CAUSAL_LM", r=3)
        )
        for cast in (False, True):
            step = Step(name, copy.deepcopy(model), mode)
            with torch.autocast("cpu", dtype=BF16, enabled=cast):
                step.backward(batch_for(name))
            assert step.norms().dtype == torch.float32
            for key, parameter in step.model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.dtype == torch.float32
                    sample = {"hooks": "grad_sample", "ghost": "_norm_sample", "bk": "summed_grad"}
                    assert getattr(parameter, sample[mode]).dtype == torch.float32, key
            assert all(value.dtype == torch.float32 for value in step.gradient().values())


# --- a GradScaler -----------------------------------------------------------------------------------


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**16)


@pytest.mark.parametrize(
    ("name", "mode", "reduction"),
    [
        *((name, "hooks", "mean") for name in NAMES if TASK[name] != "base"),
        *((name, mode, "sum") for name in CLASSES for mode in ("hooks", "functorch", "ew")),
    ],
)
def test_a_grad_scaler_is_refused(name: str, mode: str, reduction: str) -> None:
    """Norms 65536 times too large: every row would be clipped, however short, without a sign."""
    batch = batch_for(name)
    step = Step(name, dpzoo.convert(stock_model(name)), mode, reduction=reduction)
    ids = batch.pop("input_ids")
    loss = dpzoo.ModelLoss(reduction=reduction)(step.wrapped(ids, **batch))
    with pytest.raises(
        dpzoo.InputError, match=rf"The loss of {name} was multiplied by .*GradScaler.*bfloat16"
    ):
        scaler().scale(loss).backward()


def test_a_grad_scaler_is_refused_through_an_adapter_and_double_heads() -> None:
    """PEFT calls forward() past __call__, and double heads have a second loss."""
    from peft import LoraConfig, get_peft_model

    name = "GPT2LMHeadModel"
    model = get_peft_model(dpzoo.convert(stock_model(name)), LoraConfig(task_type="CAUSAL_LM", r=3))
    step = Step(name, model, "hooks")
    with pytest.raises(dpzoo.InputError, match="GradScaler"):
        scaler().scale(step.wrapped(**batch_for(name)).loss).backward()
    name = "GPT2DoubleHeadsModel"
    step = Step(name, dpzoo.convert(stock_model(name)), "hooks")
    with pytest.raises(dpzoo.InputError, match="GradScaler"):
        scaler().scale(step.wrapped(**batch_for(name)).mc_loss).backward()


def test_ghost_mode_s_loss_is_refused_by_the_scaler_itself() -> None:
    """An Opacus fact: the loss is no tensor. Multiplied by hand, it is the model that refuses."""
    name = "BertForSequenceClassification"
    step = Step(name, dpzoo.convert(stock_model(name)), "ghost")
    step.criterion.criterion.batch = batch_for(name)
    loss = step.criterion(step.wrapped(**batch_for(name)))
    with pytest.raises(ValueError, match="outputs must be a Tensor"):
        scaler().scale(loss)
    with pytest.raises(dpzoo.InputError, match="GradScaler"):
        (loss * 2.0**16).backward()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_losses_that_are_weighted_or_divided_pass(mode: str) -> None:
    """A refusal of gradient accumulation or of weights would break honest loops."""
    name = "BertForSequenceClassification"
    batch = batch_for(name)
    step = Step(name, dpzoo.convert(stock_model(name)), mode, reduction="sum")
    step.criterion.reduction = "sum"
    for factor in (1.0, 0.25, 3.0, 100.0):
        if mode == "ghost":
            step.criterion.criterion.batch = batch
            (factor * step.criterion(step.wrapped(**batch))).backward()
        else:
            (factor * step.wrapped(**batch).loss_per_sample.sum()).backward()
        step.optimizer.zero_grad()
    if mode == "hooks":
        losses = step.wrapped(**batch).loss_per_sample
        (losses * torch.tensor([64.0, 1.0, 128.0, 64.0])).sum().backward()


def test_a_grad_scaler_without_opacus_is_none_of_our_business() -> None:
    """The same model trains in float16 with a scaler, without privacy, as the stock model does."""
    name = "BertForSequenceClassification"
    model = dpzoo.convert(stock_model(name, torch.float32)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.classifier.weight.detach().clone()
    scaling = scaler()
    scaling.scale(model(**batch_for(name)).loss).backward()
    scaling.step(optimizer)
    assert not torch.equal(model.classifier.weight, before)
    # Nor after Opacus has gone.
    step = Step(name, model, "hooks")
    step.engine.to_standard_module()
    step.engine.cleanup()
    scaling.scale(model(**batch_for(name)).loss).backward()


@pytest.mark.parametrize("norm", [1e-3, 1e3])
def test_what_a_scaler_does_to_opacus(norm: float) -> None:
    """An Opacus fact: a row of norm 0.001 contributes C; unscaled afterwards, C / scale would be left."""
    layer = nn.Linear(1, 1, bias=False)
    model, optimizer, criterion = private_layer(layer, "hooks", torch.full((1,), norm))
    before = layer.weight.detach().clone()
    scaling = scaler()
    scaling.scale(criterion(model(torch.ones(1, 1)))).backward()
    scaling.step(optimizer)  # unscales a gradient that optimizer.step() then replaces
    assert float((layer.weight.detach() - before).abs()) == pytest.approx(1.0, rel=1e-3)
    ghost, optimizer, criterion = private_layer(
        nn.Linear(1, 1, bias=False), "ghost", torch.full((1,), norm)
    )
    (criterion(ghost(torch.ones(1, 1))) * 2.0**16).backward()
    (gradient,) = [p.grad for p in optimizer.params]
    assert float(gradient) == pytest.approx(1.0, rel=1e-3)
    assert float(gradient) / 2.0**16 < 2e-5  # what scaler.unscale_(optimizer) leaves for the step
