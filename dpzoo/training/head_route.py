"""The route of a head on a frozen model's features."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from dpzoo import heads
from dpzoo.accounting import epsilon_of
from dpzoo.integrations import Plan, PrivacyCard
from dpzoo.integrations.accounting import noise_for
from dpzoo.integrations.plan import duration, fixed_bytes
from dpzoo.training.data import texts_of
from dpzoo.training.job import CANARIES_NAME, DEVICE, Job


class HeadRoute:
    """A classifier's last layer, on features that are read once (`dpzoo.heads`)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        model = job.model.to(DEVICE)
        pooled = model.config.model_type in ("bert", "roberta")
        self.norm = heads.pool_by_mean(model) if pooled else None

    def plan(self) -> Plan:
        job = self.job
        texts = texts_of(job.train_rows, job.task.text)
        some = texts[:: max(1, len(texts) // 32)]
        began = time.perf_counter()
        self._read(some)
        reading = (time.perf_counter() - began) / len(some)
        logical = max(1, min(job.batch, math.ceil(job.rows / 2)))
        batches = math.ceil(job.rows / logical)
        steps = math.ceil(job.epochs) * batches
        _, layer = heads.output_layer(job.model)
        trained = sum(p.numel() for p in layer.parameters())
        self.planned = Plan(
            units=job.rows,
            unit="row",
            logical=logical,
            physical=job.rows,
            steps=steps,
            sample_rate=1 / batches,
            noise_multiplier=noise_for("prv", job.recipe.epsilon, job.delta, 1 / batches, steps),
            clipping_norm=job.clipping_norm,
            epsilon=job.recipe.epsilon,
            delta=job.delta,
            accountant="prv",
            trained=trained,
            learning_rate=job.rate,
            seconds=reading * (job.rows + len(job.heldout)) + 2e-9 * trained * job.rows * steps,
            memory=fixed_bytes(job.model) + 12.0 * layer.in_features * job.rows,
        )
        return self.planned

    def _read(self, texts: list[str], progress: Any = None) -> torch.Tensor:
        job = self.job
        return heads.read_features(
            job.model, job.tokenizer, texts, max_length=job.length, progress=progress
        )

    def train(self, resume: bool) -> tuple[PrivacyCard, Any]:
        job, plan = self.job, self.planned  # nothing to resume: a head is trained in one go
        began, told = time.monotonic(), [0.0]

        def read(done: int, total: int) -> None:
            spent = time.monotonic() - began
            if spent > 10 and done / total >= told[0] + 0.1:
                told[0] = done / total
                job.say(
                    f"reading   {done / total:.0%}, {duration(spent * (total / done - 1))} left"
                )

        def step(done: int, total: int, loss: float) -> None:
            if done % max(1, total // 5) == 0:
                history = ((plan.noise_multiplier, plan.sample_rate, done),)
                spent = epsilon_of("prv", history, job.delta)
                job.say(
                    f"step      {done}/{total}  loss {loss:.4f} (not private)  epsilon {spent:.2f}"
                )

        values = self._read(texts_of(job.train_rows, job.task.text), read)
        run = heads.train_head(
            job.model,
            values,
            torch.tensor(job.classes),
            epsilon=job.recipe.epsilon,
            delta=job.delta,
            epochs=math.ceil(job.epochs),
            batch_size=job.batch,
            learning_rate=job.rate,
            max_grad_norm=job.clipping_norm,
            feature_norm=self.norm,
            progress=step,
            canaries=job.canaries,
        )
        if job.canaries is not None:
            job.work.mkdir(parents=True, exist_ok=True)
            job.canaries.save(job.work / CANARIES_NAME)
        card = PrivacyCard(
            epsilon=run.epsilon or 0.0,
            delta=job.delta,
            accountant="prv",
            noise_multiplier=run.noise_multiplier or 0.0,
            clipping_norm=job.clipping_norm,
            sample_rate=run.sample_rate,
            steps=run.steps,
            units=job.rows,
            trained=f"the last layer, {plan.trained:,} of {job.model.num_parameters():,} parameters, on "
            f"what the frozen rest says of each row",
            tuned=job.tuned,
        )
        return card, job.model

    def score(self, model: Any) -> dict[str, float]:
        labels = self.job.heldout_classes
        values = self._read(texts_of(self.job.heldout, self.job.task.text))
        guesses = heads.output_layer(model)[1](values.to(DEVICE)).argmax(1).tolist()
        right = sum(a == b for a, b in zip(guesses, labels, strict=True)) / len(labels)
        return {"accuracy": right, "accuracy of always one class": self.job.majority()}
