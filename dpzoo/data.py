"""What Poisson sampling needs of a data loader beyond what Opacus gives it."""

from typing import Any

from opacus.data_loader import CollateFnWithEmpty
from torch.utils.data import DataLoader

from dpzoo.errors import InputError


def prime_empty_batches(loader: DataLoader[Any], example: Any = None) -> DataLoader[Any]:
    """Let a Poisson loader begin with an empty batch.

    Opacus' loader learns what an empty batch looks like from the first batch that is not. If the
    very first draw of a run is empty (with probability exp(-expected batch size), and more often in
    small tests), rows that are dicts, as transformers' collators take them, give a ``TypeError``.
    Call this once on the loader that ``make_private`` returned.

    Args:
        loader: the Poisson loader from Opacus; changed in place.
        example: any collated batch; by default, the first row of the data set, collated. Only its
            keys, dtypes and shapes are used, the latter with 0 rows.

    Returns:
        The same loader.

    Raises:
        InputError: the loader is not Opacus' Poisson loader.
    """
    collate = loader.collate_fn
    if not isinstance(collate, CollateFnWithEmpty):
        raise InputError(
            f"prime_empty_batches got a {type(loader).__name__} whose batches cannot be empty, wanted "
            f"the loader that PrivacyEngine.make_private(poisson_sampling=True) returns."
        )
    if collate.first_batch is None:
        if example is None:
            example = collate([loader.dataset[0]])
        collate.first_batch = example
    return loader
