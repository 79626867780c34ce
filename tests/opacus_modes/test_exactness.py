"""28 classes in every mode of an unmodified Opacus: per-row norms and clipped sums, to 1e-9."""

import pytest

from tests.modes import MODES, assert_step_is_exact
from tests.support import NAMES, TIED, batch_for, stock_model


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_clipped_sums(name: str, mode: str, padding: str) -> None:
    assert_step_is_exact(name, mode, batch_for(name, padding=padding), stock_model(name))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TIED)
def test_untied(name: str, mode: str, padding: str) -> None:
    stock = stock_model(name, tie_word_embeddings=False)
    assert_step_is_exact(name, mode, batch_for(name, padding=padding), stock)
