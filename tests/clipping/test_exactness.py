"""Book-keeping: per-row norms and clipped sums of all 28 classes, against the oracle."""

import pytest

from tests.modes import assert_step_is_exact
from tests.support import NAMES, TIED, batch_for, stock_model


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_clipped_sums(name: str, padding: str) -> None:
    assert_step_is_exact(name, "bk", batch_for(name, padding=padding), stock_model(name))


@pytest.mark.parametrize("name", TIED)
def test_untied(name: str) -> None:
    stock = stock_model(name, tie_word_embeddings=False)
    assert_step_is_exact(name, "bk", batch_for(name), stock)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_without_a_look_up(name: str) -> None:
    assert_step_is_exact(name, "bk", batch_for(name, embeds=True), stock_model(name))


@pytest.mark.parametrize("name", NAMES)
def test_unwrapped_models(name: str) -> None:
    assert_step_is_exact(name, "bk", batch_for(name), stock_model(name), wrap_model=False)


@pytest.mark.parametrize("name", NAMES)
def test_sum_reduction(name: str) -> None:
    assert_step_is_exact(name, "bk", batch_for(name), stock_model(name), reduction="sum")
