"""Canaries: rows that a coin puts into the training data, or not, and how visible that is afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from dpzoo.auditing.batches import Batch
from dpzoo.auditing.row_losses import Loss, RowLoss
from dpzoo.errors import InputError
from dpzoo.example_batch import example_batch

Collate = Callable[[list[Any]], Any]


def thrown(number: int, coins: Any, seed: int | None) -> np.ndarray:
    """Coins, (number,) of bool: those given, or new ones.

    Raises:
        InputError: fewer than two; coins of another number.
    """
    if number < 2:
        raise InputError(
            f"Canaries got {number} rows, wanted at least 2; several hundred bound epsilon well."
        )
    if coins is None:
        source = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
        coins = source.random(number) < 0.5
    coins = np.asarray(coins, dtype=bool)
    if coins.shape != (number,):
        raise InputError(
            f"Canaries got coins of shape {coins.shape}, wanted ({number},), one for each row."
        )
    return coins


class Canaries:
    """Rows that may be in the training data, each with probability 1/2, and what the coins said.

        canaries = dpzoo.Canaries(rows)
        train_rows = canaries.mix(private_rows)     # train on these, whatever the loop
        report = dpzoo.audit_run(canaries, canaries.losses(model), delta=delta, epsilon=epsilon)

    Args:
        rows: a sequence of rows, of the kind that the training data have. They must not be private: what
            they are may be seen in the model, and a copy of a private row would double its share.
        coins: whether each row is in, of a run whose coins were kept (`coins`); by default they are thrown.
        seed: fixes the coins, for tests; by default they come from the operating system.

    Raises:
        InputError: fewer than two rows; coins of another number.

    Guarantees:
        The training's guarantee for every private row is what it was: canaries are further rows of the data
        set, with the coins drawn independently of it. The account has to be that of the mixed data (its
        sample rate, its delta).
    """

    def __init__(self, rows: Sequence[Any], *, coins: Any = None, seed: int | None = None) -> None:
        self.rows = rows
        self.coins = thrown(len(rows), coins, seed)
        """(canaries,), True for the rows that are trained on. Keep them: `np.save`."""

    @classmethod
    def random(
        cls, number: int, task: str, config: Any, *, length: int = 32, seed: int | None = None
    ) -> Canaries:
        """Rows of random tokens with random labels, for one of dpzoo's tasks.

        Args:
            number: of canaries.
            task: its name, as in `dpzoo.from_pretrained`.
            config: the model's.
            length: tokens of a row.
            seed: fixes tokens and coins, for tests.
        """
        generator = torch.Generator()
        generator.manual_seed(secrets.randbits(63) if seed is None else seed)
        ids = torch.randint(config.vocab_size, (number, length), generator=generator)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "num_labels", 0) > 1:
            texts["class"] = torch.randint(config.num_labels, (number,), generator=generator)
        batch = example_batch(task, config, texts)
        rows = [{name: value[i] for name, value in batch.items()} for i in range(number)]
        return cls(rows, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def mix(self, dataset: Dataset[Any]) -> Dataset[Any]:
        """The data set, and after it the canaries that are in.

        Args:
            dataset: rows by index, with a length.

        Raises:
            InputError: its rows are dicts with other keys than the canaries'.
        """
        own, other = (
            set(row.keys()) if hasattr(row, "keys") else None for row in (self.rows[0], dataset[0])
        )
        if own != other:
            raise InputError(
                f"Canaries.mix got rows with {_keys(other)} for canaries with {_keys(own)}, wanted the "
                f"same: they go into one batch. Give both the same columns."
            )
        return ConcatDataset([dataset, Subset(self.rows, np.flatnonzero(self.coins).tolist())])  # type: ignore[arg-type]

    def losses(
        self,
        model: Any,
        *,
        loss: Loss | None = None,
        collate: Collate = default_collate,
        reference: Any = None,
    ) -> np.ndarray:
        """Score each canary by how small its loss is: black box.

        Args:
            model: the trained model, wrapped or not; put in eval mode for the time.
            loss: maps (model, batch) to the loss of a row; by default the model's own, as in `dpzoo.audit`.
            collate: makes a batch of a list of one row.
            reference: a model that was not trained on them, whose losses are the measure.

        Returns:
            Scores, (canaries,), larger for smaller losses.
        """
        scores = -np.array([float(value) for value in self._each(model, loss, collate, grad=False)])
        if reference is not None:
            scores -= self.losses(reference, loss=loss, collate=collate)
        return scores

    def watch(
        self,
        model: Any,
        optimizer: Any,
        *,
        loss: Loss | None = None,
        collate: Collate = default_collate,
        parameters: Sequence[torch.Tensor] | None = None,
    ) -> Trace:
        """Record how far each coming step goes along each canary's gradient: white box.

        What is recorded is the gradient that the optimizer steps with, noise included: it is what the
        accountant takes for published.

        Args:
            model: as it is before training; the canaries' gradients are taken here, and once.
            optimizer: the private one, or the torch optimizer that it steps.
            loss: as in `losses`.
            collate: as in `losses`.
            parameters: whose gradients are looked at; by default all that are trained. There is a number
                in memory for each canary and each of their entries.

        Returns:
            The `Trace`; ``trace.close()`` ends it.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        trace = Trace(trained if parameters is None else list(parameters))
        for value in self._each(model, loss, collate, grad=True):
            gradients = torch.autograd.grad(value, trace.parameters, allow_unused=True)
            trace.directions.append(trace.flat(gradients))
        trace.attach(getattr(optimizer, "original_optimizer", optimizer))
        return trace

    def _each(self, model: Any, loss: Loss | None, collate: Collate, *, grad: bool) -> Any:
        """Each canary's loss, the row alone, in eval mode."""
        model = getattr(model, "_module", model)  # beneath Opacus' and dpzoo's wrappers
        row_loss, training = RowLoss(loss), model.training
        device = next(model.parameters()).device
        model.eval()
        try:
            for row in self.rows:
                batch = Batch(collate([row]))
                batch = batch.map(lambda _, tensor: tensor.to(device))
                with torch.set_grad_enabled(grad):
                    value = row_loss(model, batch).sum()
                if row_loss.source == "outputs":
                    raise InputError(
                        f"{type(model).__name__} gives no loss for a canary, wanted one in its outputs, or "
                        f"loss=..., a function of (model, batch) that returns the loss."
                    )
                yield value
        finally:
            model.train(training)


class Trace:
    """Inner products of the canaries' gradients, at unit length, with the gradients of a run's steps.

    Args:
        parameters: those whose gradients are looked at.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.directions: list[torch.Tensor] = []
        self._steps: list[np.ndarray] = []
        self._matrix: torch.Tensor | None = None

    def flat(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Gradients of the parameters as one vector; zeros for None."""
        pairs = zip(self.parameters, gradients, strict=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).detach().flatten() for p, g in pairs]
        )

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients before each of its steps."""
        matrix = torch.stack(self.directions)
        self._matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-30)
        self.directions = []
        self._handle = optimizer.register_step_pre_hook(self._see)

    def _see(self, *_: Any) -> None:
        assert self._matrix is not None
        self._steps.append(
            (self._matrix @ self.flat([p.grad for p in self.parameters])).cpu().numpy()
        )

    def close(self) -> None:
        """Look no more."""
        self._handle.remove()

    @property
    def steps(self) -> np.ndarray:
        """(steps, canaries).

        Raises:
            InputError: no step was seen.
        """
        if not self._steps:
            raise InputError(
                "The trace has no steps. Wanted a run after Canaries.watch, with the optimizer that it got."
            )
        return np.stack(self._steps)

    def sums(self) -> np.ndarray:
        """Scores, (canaries,): how far the run went along each canary's gradient."""
        return self.steps.sum(0)

    def spread(self) -> np.ndarray:
        """Scores, (canaries,): how unlike the steps are. Noise that repeats cancels in it."""
        return self.steps.std(0)


def _keys(keys: Any) -> str:
    return "no names (tuples or tensors)" if keys is None else f"the keys {sorted(keys)}"
