"""docs/pitfalls.md says what the planted bugs say today; figures may differ in their last digits."""

import re
from pathlib import Path

from tests.auditing.pitfalls import page

PAGE = Path(__file__).parents[2] / "docs" / "pitfalls.md"


def test_the_page_is_up_to_date() -> None:
    def without_figures(text: str) -> list[str]:
        return re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text).splitlines()

    wanted = "run python -m tests.auditing.pitfalls > docs/pitfalls.md"
    assert without_figures(PAGE.read_text(encoding="utf-8")) == without_figures(page()), wanted
