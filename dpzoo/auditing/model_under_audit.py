"""The model under audit: a copy of it, and the reference gradients, each row run alone.

Everything happens on deep copies in float64, in train mode with dropout off. The reference gradients come
from plain autograd, and are computed once.
"""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dpzoo.auditing.batches import FEW_ROWS, IGNORE_INDEX, MOST_ROWS, Batch, prepared
from dpzoo.auditing.book_keeping import mode_around
from dpzoo.auditing.capture import Trace, trace
from dpzoo.auditing.numerics import TOLERANCE, Gradients, disagreements, row_norms
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY, ModeRun, OpacusMode, first_line
from dpzoo.auditing.randomness import RandomDraws, numbers
from dpzoo.auditing.row_losses import Loss, RowLoss
from dpzoo.clipping.units import checked_ids
from dpzoo.errors import InputError
from dpzoo.modes import MODES

MOST_WHOLE = 64
"""Rows of the batch as given that are run together."""


class CannotRunError(Exception):
    """Something that a check needs raised; the message is its first line."""


class ModelUnderAudit:
    """A model and a batch under audit.

    Args:
        model, batch, loss, max_grad_norm, modes, unit_ids: as `dpzoo.audit`'s; the model is not touched.
        rows_as_given: keep the number of rows of the batch.
        quick: take fewer rows.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss: Loss | None,
        max_grad_norm: float,
        modes: tuple[str, ...],
        rows_as_given: bool = False,
        quick: bool = False,
        unit_ids: Any = None,
    ) -> None:
        self.original = model
        self.max_grad_norm = max_grad_norm
        self.modes = modes
        self.user_loss = loss
        given = Batch(batch)
        sizes = {size for p in model.parameters() for size in p.shape}
        self.units = None if unit_ids is None else (given, checked_ids(unit_ids, given.rows))
        """The batch as it was given, and the ids of its rows' units; None without ids."""
        if self.units is not None and len(set(self.units[1])) < 2:
            raise InputError(
                "audit got unit_ids of one unit, wanted at least 2: one is taken away."
            )
        most = FEW_ROWS if quick else MOST_ROWS
        self.batch, self.remarks = (given, []) if rows_as_given else prepared(given, sizes, most)
        self.rows = self.batch.rows
        self.loss = RowLoss(loss)
        self.dtype = torch.float64
        self.given_batch = self.batch  # in the user's dtype
        self.model = self._in_double()
        self.tolerance = TOLERANCE[self.dtype]
        self.whole = given.take(range(min(given.rows, MOST_WHOLE))).to(self.dtype)
        """The batch as given, up to `MOST_WHOLE` rows, in the audit's dtype."""
        self.quick = quick
        self.random = self._hold_draws()
        """Why two runs of the model differ, though what it draws is held fixed; empty where they do not."""
        self.batch.targets = self.whole.targets = self._targets()
        self._mode_runs: dict[str, ModeRun] = {}
        self._opacus: dict[str, OpacusMode] = {}

    # --- the copy -----------------------------------------------------------------------------------

    def fresh_copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A deep copy of the user's model in train mode, dropout off, in the audit's dtype or another.

        A model that is in train mode keeps the flags of its submodules: frozen norms stay in eval mode.

        Raises:
            InputError: the model cannot be copied.
        """
        try:
            made = copy.deepcopy(self.original)
        except Exception as error:
            raise InputError(
                f"audit works on a deep copy, and {type(self.original).__name__} cannot be copied: "
                f"{first_line(error)}. Pass the model before it is wrapped or hooked."
            ) from error
        if not made.training:
            made.train()
        for module in made.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            for name, value in list(vars(module).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
        for parameter in made.parameters():
            parameter.grad = None
        return made.to(dtype) if dtype is not None else made

    def _in_double(self) -> nn.Module:
        """The copy in float64, or in float32 where the model or its device has nothing wider."""
        try:
            made = self.fresh_copy(torch.float64)
            self.batch = self.given_batch.to(torch.float64)
            self.loss(made, self.batch)
            return made
        except InputError:
            raise
        except Exception as error:
            self.dtype = torch.float32
            made = self.fresh_copy(torch.float32)
            self.batch = self.given_batch.to(torch.float32)
            try:
                self.loss(made, self.batch)
            except InputError:
                raise
            except Exception as again:
                raise InputError(
                    f"audit's batch does not run through {type(self.original).__name__}: "
                    f"{first_line(again)}. Wanted a batch that model(**batch) or model(*batch) takes, "
                    f"or a loss(model, batch)."
                ) from again
            self.remarks.append(f"float64 does not run ({first_line(error)}); compared in float32")
            return made

    def _hold_draws(self) -> str:
        """Hold the draws of a model that is random in training, and see whether that makes runs equal."""
        before = numbers()
        with RandomDraws(fixed=False) as draws:
            self.loss(self.model, self.batch)
        drew = [*draws.seen] + ["Python's or numpy's random numbers"] * (numbers() != before)
        if not drew:
            return ""
        self.remarks.append(
            f"random in training ({', '.join(drew)}), with constants instead of the draws"
        )
        self.loss.fixed = True
        one, two = (self.total_gradient(self.batch) for _ in range(2))
        after = []
        for batch in (self.batch, self.batch.take(range(self.rows - 1))):
            self.loss(self.model, batch)
            after.append(numbers())
        differs = disagreements(one, two, self.tolerance)
        if not differs and after[0] == after[1] and not draws.loose:
            return ""
        return f"random in training ({', '.join(drew)}): equal runs differ, and nothing can be compared"

    def _targets(self) -> frozenset[str]:
        """Integer tensors that take -100, under whatever name: there it says that a token has no label."""
        found = set()
        for name, tensor in self.batch.tensors().items():
            known = "label" in name or "mask" in name or tensor.dtype == torch.bool
            if known or tensor.dim() < 2 or tensor.is_floating_point():
                continue
            if not bool((tensor == IGNORE_INDEX).any()):
                if tensor.device.type != "cpu":  # an id out of range would end the process
                    continue
                changed = tensor.clone()
                changed[0].view(-1)[1:] = IGNORE_INDEX
                if not self._takes(name, changed):
                    continue
            found.add(name)
        return frozenset(found)

    def _takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the batch runs with another tensor in it."""
        tried = self.batch.map(lambda other, old: tensor if other == name else old)
        try:
            with torch.no_grad():
                return bool(self.loss(self.model, tried).isfinite().all())
        except Exception:
            return False

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, each once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Name of a trainable parameter -> all the names that it has, itself first."""
        every: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            every.setdefault(id(parameter), []).append(name)
        return {name: tuple(every[id(p)]) for name, p in self.parameters.items()}

    @property
    def tied(self) -> list[tuple[str, ...]]:
        """The names of every parameter that has several."""
        return [names for names in self.names.values() if len(names) > 1]

    def owners(self, parameters: Any) -> tuple[str, ...]:
        """The modules that hold some parameters, without repetition."""
        names = (full for name in parameters for full in self.names.get(name, (name,)))
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))

    # --- the truth ----------------------------------------------------------------------------------

    def gradient(self, value: torch.Tensor, **options: Any) -> Gradients:
        """Plain autograd's gradient of a scalar; zeros for what it does not reach."""
        gradients = torch.autograd.grad(
            value, list(self.parameters.values()), allow_unused=True, **options
        )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True)
        }

    def total_gradient(self, batch: Batch) -> Gradients:
        """The gradient of the sum of the rows' losses (of a scalar's: times the number of rows)."""
        if batch.rows == 0:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        return self.gradient(self.loss.total(self.model, batch))

    def alone(self, batch: Batch, row: int) -> Gradients:
        """The gradient of a row's loss, the row run as a batch of one."""
        return self.total_gradient(batch.take([row]))

    @cached_property
    def _oracle(self) -> tuple[Gradients | None, list[set[str]], str]:
        rows: list[Gradients] = []
        unreached: list[set[str]] = []
        for i in range(self.rows):
            try:
                total = self.loss.total(self.model, self.batch.take([i]))
                gradients = torch.autograd.grad(
                    total, list(self.parameters.values()), allow_unused=True
                )
            except Exception as error:
                return None, [], first_line(error)
            pairs = list(zip(self.parameters.items(), gradients, strict=True))
            unreached.append({name for (name, _), g in pairs if g is None})
            rows.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
        return {n: torch.stack([row[n] for row in rows]) for n in self.parameters}, unreached, ""

    @property
    def oracle(self) -> Gradients:
        """Every row's gradient, the row run alone: name -> (rows, *shape).

        Raises:
            CannotRunError: a row cannot run alone.
        """
        gradients, _, error = self._oracle
        if gradients is None:
            raise CannotRunError(f"a row cannot run alone ({error})")
        return gradients

    @property
    def unreached(self) -> list[set[str]]:
        """For each row, the parameters that autograd does not reach when the row runs alone."""
        return self._oracle[1]

    @cached_property
    def norms(self) -> torch.Tensor:
        """The norm of each row's true gradient, (rows,)."""
        return row_norms(self.oracle)

    @cached_property
    def per_row_loss(self) -> bool:
        """Whether the loss gives one value for each row, rather than a scalar."""
        with torch.no_grad():
            return self.loss(self.model, self.batch).dim() == 1

    def own_rows(self, batch: Batch) -> Gradients:
        """The gradient of each row's loss inside the batch; needs a loss with one value a row."""
        losses = self.loss(self.model, batch)
        rows = [self.gradient(value, retain_graph=True) for value in losses]
        return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}

    @cached_property
    def traces(self) -> list[Trace]:
        """What the modules that hold parameters see, with all rows and with one row less."""
        return trace(self.model, self.loss, self.batch, self.batch.take(range(self.rows - 1)))

    # --- Opacus -------------------------------------------------------------------------------------

    def opacus(self, mode: str) -> OpacusMode:
        """Opacus, or dpzoo's engine, around a copy of the model, in a mode."""
        if mode not in self._opacus:
            self._opacus[mode] = mode_around(lambda: self.fresh_copy(self.dtype), mode, self.loss)
        return self._opacus[mode]

    def mode_run(self, mode: str) -> ModeRun:
        """What a mode computes for the batch; kept."""
        if mode not in self._mode_runs:
            self._mode_runs[mode] = self.opacus(mode).run(self.batch)
        return self._mode_runs[mode]

    def broken(self, mode: str) -> str:
        """Why checks that need whole per-sample gradients cannot use a mode; empty if they can."""
        if mode == "bk" and not self.per_row_loss:
            return PER_ROW_LOSS_ONLY[mode]
        run = self.mode_run(mode)
        if run.error:
            return f"{mode} raises"
        values = run.values
        if values.keys() != self.parameters.keys():
            return f"{mode} lacks parameters"
        if any(len(value) != self.rows for value in values.values()):
            return f"{mode}'s batch dimensions differ from the rows"
        return ""

    @cached_property
    def exact_modes(self) -> set[str]:
        """The modes whose per-sample gradients are those of the rows run alone."""
        try:
            return {
                mode
                for mode in self.modes
                if MODES[mode].rows
                and not self.broken(mode)
                and not disagreements(self.mode_run(mode).rows, self.oracle, self.tolerance)
            }
        except CannotRunError:
            return set()

    def usable(self, mode: str, skipped: list[str]) -> bool:
        """Whether a mode can be used; where it cannot, the reason is added to ``skipped``."""
        reason = self.broken(mode)
        if reason:
            skipped.append(f"{reason} (see coverage)")
        return not reason
