"""Statelessness: what the model keeps of a batch besides its gradients."""

import copy

from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.record import Record
from dpzoo.clipping.frozen import FrozenWatch, refuse_learning_buffers
from dpzoo.errors import InputError, UnsupportedModelError


def statelessness(subject: ModelUnderAudit, record: Record) -> None:
    """In a training forward no buffer and no frozen parameter changes.

    Catches: running statistics of BatchNorm (affine or not, frozen or not) and InstanceNorm, running
    means and code books in buffers, Embedding(max_norm): they are published with the model, and have
    neither clipping nor noise.
    """
    record.ran()
    model = copy.deepcopy(subject.model)
    try:
        refuse_learning_buffers(model)
    except UnsupportedModelError as error:
        record.find(
            "privacy", str(error).splitlines()[0], "replace the layer, or keep it in eval mode"
        )
        return
    watch = FrozenWatch(model)
    try:
        subject.loss(model, subject.batch)
    except InputError as error:
        record.find(
            "privacy",
            str(error).splitlines()[0],
            "keep the layer that writes it in eval mode, or remove it",
        )
    except Exception as error:
        record.skip(f"the model raises: {first_line(error)}")
    finally:
        watch.remove()
