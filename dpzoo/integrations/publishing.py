"""What a private trainer writes and uploads: nothing that is secret, and no losses of training rows."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from dpzoo.integrations.card import UNPUBLISHED, publishable
from dpzoo.integrations.inputs import base_of
from dpzoo.integrations.sharding import whole_state


class PublishingTrainer(Trainer):
    """The part of `DPTrainer` that saves the model, its card and its metrics, and uploads them."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.delta is not None and self.args.should_save:
            folder = output_dir or self.args.output_dir
            # A checkpoint's privacy.json is written last, and is what it is resumed by.
            checkpoint = os.path.basename(folder).startswith(f"{PREFIX_CHECKPOINT_DIR}-")
            self.card().write(folder, state=not checkpoint, **self._metadata())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's: a stock checkpoint, under FSDP2 too, where all ranks have to call it."""
        if self._sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir or self.args.output_dir, state_dict=whole_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _metadata(self) -> dict[str, Any]:
        base = getattr(base_of(self.model).config, "_name_or_path", "") if self.model else ""
        return {"base_model": base if base and not os.path.exists(base) else None}

    def create_model_card(self, **metadata: Any) -> None:
        """The privacy card, in place of Trainer's, which shows losses of training rows.

        Args:
            **metadata: fields of `huggingface_hub.ModelCardData`.
        """
        self.card().write(self.args.output_dir, **{**self._metadata(), **metadata})

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata: Any,
    ) -> Any:
        """As Trainer's: the model and its card, nothing that is secret or has losses of training rows."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**metadata)
        self._finish_current_push()
        hub: Any = HfApi()
        return hub.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=args.output_dir,
            commit_message=commit_message,
            token=token or args.hub_token,
            run_as_future=not blocking,
            ignore_patterns=list(UNPUBLISHED),
            revision=revision or getattr(args, "hub_revision", None),
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")

    def save_state(self) -> None:
        """As Trainer's, without the losses of training rows: it lies beside what is published."""
        whole = self.state.log_history
        self.state.log_history = [publishable(entry) for entry in whole]
        try:
            super().save_state()
        finally:
            self.state.log_history = whole

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """As Trainer's, without the losses of training rows."""
        super().save_metrics(split, publishable(metrics), combined)
