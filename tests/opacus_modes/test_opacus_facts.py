"""What Opacus 1.6 itself does that dpzoo is built around, each seen in a few lines without dpzoo.

Every test asserts what Opacus (or torch's ExpandedWeights under it) was observed to do, not what it
should do. A test that fails with another release means that the release has changed: read the comment
in it, and see whether the part of dpzoo that it names is still needed, or the user's warning true.
"""

from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

ROWS, SEQ, HIDDEN, VOCAB, PAD = 3, 5, 4, 7, 0

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


class Squares:
    """Half the squared output of each row, summed over the rows: a loss for any output."""

    reduction = "sum"

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        rows = outputs.square().flatten(1).sum(1) / 2
        return rows if self.reduction == "none" else rows.sum()


def private(
    model: nn.Module, mode: str, *, clip: float = 1.0, learning_rate: float = 1.0
) -> tuple[Any, Any, Any]:
    """Opacus' wrapped model, its optimizer (no noise, sums over rows) and the loss of the mode."""
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate),
        criterion=Squares(),
        data_loader=DataLoader(list(range(ROWS)), batch_size=ROWS),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        loss_reduction="sum",
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    return made[0], made[1], made[2] if mode == "ghost" else Squares()


def row_norms(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The norm of each row's gradient by autograd, the row alone, over all trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for row in rows:
        grads = torch.autograd.grad(Squares()(model(row.unsqueeze(0))), trained)
        norms.append(torch.stack([g.norm() for g in grads]).norm())
    return torch.stack(norms)


def ids_with_padding() -> torch.Tensor:
    ids = torch.randint(1, VOCAB, (ROWS, SEQ))
    ids[0, 2:] = PAD
    return ids


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# --- embeddings -------------------------------------------------------------------------------------


def test_the_embeddings_grad_sampler_trains_the_padding_row() -> None:
    # dpzoo: grad_samplers/embeddings.py sets the gradients of padding positions to zero.
    model, ids = nn.Embedding(VOCAB, HIDDEN, padding_idx=PAD), ids_with_padding()
    nn.init.normal_(model.weight)
    wrapped, _, loss = private(model, "hooks")
    loss(wrapped(ids)).backward()
    assert float(model.weight.grad[PAD].norm()) == 0  # autograd's
    assert float(model.weight.grad_sample[0, PAD].norm()) > 1


def test_the_embeddings_norm_sampler_counts_the_padding_row() -> None:
    # dpzoo: the same file, for the norms: a row would be clipped for a gradient that it does not have.
    model, ids = nn.Embedding(VOCAB, HIDDEN, padding_idx=PAD), ids_with_padding()
    nn.init.normal_(model.weight)
    true = row_norms(model, ids)
    wrapped, _, loss = private(model, "ghost")
    loss(wrapped(ids)).backward()
    norms = wrapped.per_sample_gradient_norms
    assert float(norms[0]) > 1.1 * float(true[0])
    torch.testing.assert_close(norms[1:], true[1:])  # these rows have no padding


def test_the_embeddings_norm_sampler_fails_on_an_empty_batch() -> None:
    # Poisson sampling draws empty batches. dpzoo: `_rows` in grad_samplers/embeddings.py.
    wrapped, _, loss = private(nn.Embedding(VOCAB, HIDDEN), "ghost")
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        loss(wrapped(torch.zeros(0, SEQ, dtype=torch.long))).backward()


def test_the_embeddings_norm_sampler_fails_on_expanded_ids() -> None:
    # Stock BERT's token types are such ids. dpzoo: `rows_of_ids` in layers/embeddings.py gives
    # contiguous ones, and its own norm sampler takes any.
    wrapped, _, loss = private(nn.Embedding(VOCAB, HIDDEN), "ghost")
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        loss(wrapped(torch.arange(SEQ).expand(ROWS, SEQ))).backward()


class Positions(nn.Module):
    """Learned positions as stock Transformers look them up: ids of (1, seq), broadcast by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(SEQ, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.table(torch.arange(SEQ).unsqueeze(0)))


def test_broadcast_positions_have_no_gradient_per_row() -> None:
    # dpzoo: the models look positions up with ids of (batch, seq); see layers/embeddings.py.
    model = Positions()
    wrapped, optimizer, loss = private(model, "hooks")
    loss(wrapped(torch.randn(ROWS, SEQ, HIDDEN))).backward()
    assert len(model.linear.weight.grad_sample) == ROWS
    assert len(model.table.weight.grad_sample) == 1
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        optimizer.step()
    optimizer.zero_grad()
    loss(wrapped(torch.randn(1, SEQ, HIDDEN))).backward()
    optimizer.step()  # a batch of one hides it


# --- which sampler a module gets --------------------------------------------------------------------


class NamedLinear(nn.Linear):
    """An nn.Linear in all but its name."""


def test_a_subclass_of_a_known_layer_is_unknown() -> None:
    # Samplers are found by exact type: functorch does the work, slowly, and ghost clipping builds the
    # gradients. dpzoo: a layer that is not one of torch's own has samplers of its own.
    for cls, by_functorch in ((nn.Linear, False), (NamedLinear, True)):
        model = nn.Sequential(cls(HIDDEN, HIDDEN))
        private(model, "ghost")
        assert hasattr(model[0], "ft_compute_sample_grad") == by_functorch


def test_a_container_that_holds_a_parameter_takes_its_children_to_functorch() -> None:
    # Stock masked-LM heads hold a bias beside the decoder, and with the decoder's tied weight functorch
    # fails altogether. dpzoo: `TiedBias` in layers/lm_head.py holds none.
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.decoder = nn.Parameter(torch.zeros(VOCAB)), nn.Linear(HIDDEN, VOCAB)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(x) + self.bias

    head = Head()
    private(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), head), "hooks")
    assert hasattr(head, "ft_compute_sample_grad")
    assert not head.decoder._forward_hooks


def test_keyword_arguments_are_not_captured() -> None:
    # dpzoo: inside the models, layers that have parameters are called by position.
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(input=x)

    for mode in ("hooks", "ghost"):
        wrapped, _, loss = private(Caller(), mode)
        with pytest.raises(IndexError, match="list index out of range"):
            loss(wrapped(torch.randn(ROWS, HIDDEN))).backward()


def test_the_linear_norm_sampler_knows_no_gradients_of_four_dimensions() -> None:
    # (batch, choices, seq, hidden): no norm at all. dpzoo: choices enter the layers side by side, as
    # (batch, choices * seq, hidden); see layers/attention.py.
    wrapped, _, loss = private(nn.Linear(HIDDEN, HIDDEN), "ghost")
    with pytest.raises(AttributeError, match="_norm_sample"):
        loss(wrapped(torch.randn(ROWS, 2, SEQ, HIDDEN))).backward()


def test_functorch_fails_on_an_embedding_of_an_empty_batch() -> None:
    # dpzoo: layers/embeddings.py indexes the table instead when functorch runs it.
    wrapped, _, loss = private(nn.Embedding(VOCAB, HIDDEN), "functorch")
    with pytest.raises(RuntimeError, match="EmbeddingBackward0 returned an invalid gradient"):
        loss(wrapped(torch.zeros(0, SEQ, dtype=torch.long))).backward()


# --- tied weights -----------------------------------------------------------------------------------


class TiedModules(nn.Module):
    """A language model in small: an embedding, and a projection with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


class TiedByFunction(nn.Module):
    """The same function, the projection written as a call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.table(ids), self.table.weight)


def test_ghost_clipping_refuses_tied_modules() -> None:
    # dpzoo: `LMHead` has a grad sampler and no norm sampler, which Opacus lets through, and hands its
    # share of the norm to the embedding's sampler; see grad_samplers/lm_head.py.
    wrapped, _, loss = private(TiedModules(), "ghost")
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported with Ghost"):
        loss(wrapped(torch.randint(0, VOCAB, (ROWS, SEQ))))


def test_ghost_clipping_of_a_functional_tie_exceeds_the_clipping_norm() -> None:
    # Nothing is raised: the second backward pass has the head's gradient, the norm has not. dpzoo: the
    # head is a module. In a model of one's own, dpzoo.audit finds it.
    model, ids = TiedByFunction(), torch.randint(0, VOCAB, (1, SEQ))
    true = row_norms(model, ids)
    wrapped, optimizer, loss = private(model, "ghost", clip=1e-3)
    before = flat(model)
    loss(wrapped(ids)).backward()
    assert float(wrapped.per_sample_gradient_norms) < 0.9 * float(true)
    optimizer.step()
    assert float((flat(model) - before).norm()) > 1.1e-3


def test_hooks_lose_the_head_of_a_functional_tie() -> None:
    # The row's gradient is that of the look-up alone: private, and wrong. dpzoo: as above.
    model, ids = TiedByFunction(), torch.randint(0, VOCAB, (1, SEQ))
    wrapped, _, loss = private(model, "hooks")
    loss(wrapped(ids)).backward()
    lost = (model.table.weight.grad - model.table.weight.grad_sample[0]).norm()
    assert float(lost) > 0.3 * float(model.table.weight.grad.norm())


# --- ExpandedWeights --------------------------------------------------------------------------------


def test_expanded_weights_train_the_padding_row() -> None:
    # dpzoo: `_Table.forward` in layers/embeddings.py detaches what padding positions look up.
    model, ids = nn.Embedding(VOCAB, HIDDEN, padding_idx=PAD), ids_with_padding()
    nn.init.normal_(model.weight)
    wrapped, _, loss = private(model, "ew")
    loss(wrapped(ids)).backward()
    assert float(model.weight.grad_sample[0, PAD].norm()) > 1


def test_expanded_weights_refuse_an_empty_batch() -> None:
    # dpzoo cannot help it. With Poisson sampling, use another mode: the run stops at the first empty
    # draw, and to skip that draw would void the guarantee.
    wrapped, _, _ = private(nn.Linear(HIDDEN, HIDDEN), "ew")
    with pytest.raises(RuntimeError, match="Batch size must be positive, got 0"):
        wrapped(torch.zeros(0, HIDDEN))


def test_expanded_weights_take_the_first_input_by_position() -> None:
    # dpzoo cannot help it: call model(input_ids, attention_mask=..., ...).
    wrapped, _, _ = private(nn.Linear(HIDDEN, HIDDEN), "ew")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        wrapped(input=torch.zeros(ROWS, HIDDEN))


def test_expanded_weights_know_few_functions() -> None:
    # Stock GPT-2's Conv1D is addmm. dpzoo: GPT-2's projections are nn.Linear; see layers/transposed.py.
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
            self.bias = nn.Parameter(torch.zeros(HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    wrapped, _, _ = private(Conv1D(), "ew")
    with pytest.raises(
        RuntimeError, match=r"Expanded Weights encountered but cannot handle.*addmm"
    ):
        wrapped(torch.randn(ROWS, HIDDEN))


# --- activation checkpointing -----------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.block = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)


def test_non_reentrant_checkpointing_loses_gradients() -> None:
    # transformers' default. dpzoo: layers/checkpointing.py takes the reentrant kind, and refuses the
    # other by name. (In ghost mode Opacus speaks of tied parameters instead.)
    x = torch.randn(ROWS, HIDDEN)
    for use_reentrant, lost in ((False, True), (True, False)):
        model = Checkpointed(use_reentrant)
        wrapped, _, loss = private(model, "hooks")
        loss(wrapped(x)).backward()
        assert (model.block[0].weight.grad_sample is None) == lost
    wrapped, _, loss = private(Checkpointed(use_reentrant=False), "ghost")
    with pytest.raises(NotImplementedError, match="Parameter tying"):
        loss(wrapped(x)).backward()


# --- the training loop ------------------------------------------------------------------------------


def test_ghost_clipping_keeps_the_last_of_several_backward_passes() -> None:
    # Give large batches to BatchMemoryManager, never accumulate by hand. dpzoo.audit_loop finds it.
    model, parts = nn.Linear(HIDDEN, 1), torch.randn(2, ROWS, HIDDEN)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    moved = []
    for given in (parts, parts[1:]):
        model.load_state_dict(start)
        wrapped, optimizer, loss = private(model, "ghost")
        before = flat(model)
        for part in given:
            loss(wrapped(part)).backward()
        optimizer.step()
        moved.append(flat(model) - before)
        wrapped.to_standard_module()
    torch.testing.assert_close(moved[0], moved[1])


def test_ghost_mode_does_not_clip_a_loss_that_its_criterion_did_not_make() -> None:
    # outputs.loss.backward(), right in every other mode, takes an unclipped step here, silently. dpzoo
    # cannot see it: in ghost mode, backward() is called on what make_private's criterion returned.
    model, x = nn.Linear(HIDDEN, 1), 100 * torch.randn(ROWS, HIDDEN)
    wrapped, optimizer, _ = private(model, "ghost", clip=1.0)
    before = flat(model)
    Squares()(wrapped(x)).backward()
    optimizer.step()
    assert float((flat(model) - before).norm()) > 100 * ROWS


def test_a_first_batch_that_is_empty_has_no_keys() -> None:
    # Rows that are dicts, which is what transformers' collators take. dpzoo: `prime_empty_batches`.
    rows = [{"input_ids": torch.ones(SEQ)} for _ in range(ROWS)]
    loader = DPDataLoader(rows, sample_rate=1e-9)
    with pytest.raises(TypeError, match="dtype"):
        next(iter(loader))


def test_an_abandoned_batch_memory_manager_shifts_the_real_steps() -> None:
    # What was drawn ahead and not trained stays in the optimizer's queue: logical batches then mix two
    # draws. dpzoo.audit_loop finds it. The user: do not leave the loop early, or make the model private
    # anew.
    model = nn.Linear(HIDDEN, 1)
    _, optimizer, _ = private(model, "hooks")
    loader = DataLoader(TensorDataset(torch.randn(8, HIDDEN)), batch_size=4)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as batches:
        for _ in batches:
            break  # before optimizer.step()
    assert optimizer._step_skip_queue == [True]
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as batches:
        real = [not optimizer._check_skip_next_step() for _ in batches]
    assert real == [False, False, True, False]  # wanted: False, True, False, True


def test_a_layer_unfrozen_after_wrapping_is_not_clipped_in_ghost_mode() -> None:
    # The list of norms is made by make_private: freeze and unfreeze before that. dpzoo.audit_loop finds it.
    # (In hooks mode such a layer raises, and so does a parameter whose layer was partly trained.)
    model, x = (
        nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)),
        torch.randn(1, HIDDEN),
    )
    model[0].requires_grad_(False)
    wrapped, optimizer, loss = private(model, "ghost", clip=1e-3)
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    before = flat(model)
    true = row_norms(model, x)
    loss(wrapped(x)).backward()
    assert float(wrapped.per_sample_gradient_norms) < 0.9 * float(true)
    optimizer.step()
    assert float((flat(model) - before).norm()) > 1.1e-3


def test_a_branch_that_is_not_run_keeps_its_last_norm_in_ghost_mode() -> None:
    # dpzoo cannot see it: a model with two heads gets labels for both in every batch, or the one that is
    # not trained is frozen before make_private. (In hooks mode Opacus raises.)
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)

        def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
            return self.always(x) + (self.sometimes(x) if both else 0)

    model, x = Branches(), torch.randn(ROWS, HIDDEN)
    wrapped, optimizer, loss = private(model, "ghost", learning_rate=0.0)
    loss(wrapped(x, True)).backward()
    optimizer.step()
    optimizer.zero_grad()
    stale = model.sometimes.weight._norm_sample
    loss(wrapped(x, False)).backward()
    assert model.sometimes.weight._norm_sample is stale
    ran = torch.stack([p._norm_sample for p in model.always.parameters()]).norm(dim=0)
    assert bool((wrapped.per_sample_gradient_norms > 1.01 * ran).all())


def test_a_grad_scaler_makes_every_row_as_long_as_the_clipping_norm() -> None:
    # Norms are taken of scaled gradients: at a scale of 2^16 every row is clipped, however short. (The
    # loss of ghost mode is no tensor, and the scaler refuses it.) dpzoo: the models' own losses refuse a
    # scaler in the backward pass, see layers/precision.py; bfloat16 needs none.
    model, x = nn.Linear(HIDDEN, 1), 1e-2 * torch.randn(1, HIDDEN)
    assert float(row_norms(model, x)) < 0.5
    wrapped, optimizer, loss = private(model, "hooks", clip=1.0)
    before = flat(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss(wrapped(x))).backward()
    scaler.step(optimizer)
    assert float((flat(model) - before).norm()) == pytest.approx(1.0, abs=1e-3)
    wrapped, _, loss = private(nn.Linear(HIDDEN, 1), "ghost")
    with pytest.raises(ValueError, match="outputs must be a Tensor"):
        scaler.scale(loss(wrapped(x)))


def test_one_row_that_is_not_finite_ruins_the_model() -> None:
    # And shows that the row was there. Under Opacus' own engine dpzoo cannot help it: keep such rows out.
    for mode in ("hooks", "ghost"):
        model, x = nn.Linear(HIDDEN, 1), torch.randn(ROWS, HIDDEN)
        x[1, 0] = float("inf")
        wrapped, optimizer, loss = private(model, mode)
        loss(wrapped(x)).backward()
        optimizer.step()
        assert bool(flat(model).isnan().any())


def test_the_accountant_does_not_ask_how_batches_were_drawn() -> None:
    # Fixed batches get the epsilon of Poisson sampling, which does not hold for them: leave
    # poisson_sampling at its default. dpzoo.audit_loop finds it.
    epsilons = []
    for poisson in (True, False):
        model, engine = nn.Linear(HIDDEN, 1), PrivacyEngine(accountant="rdp")
        wrapped, optimizer, _ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(100, HIDDEN)), batch_size=10),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )
        wrapped(torch.randn(10, HIDDEN)).mean().backward()
        optimizer.step()
        epsilons.append(engine.get_epsilon(1e-3))
    assert epsilons[0] == epsilons[1]
