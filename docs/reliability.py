"""Write docs/reliability.md: what became of everything odd, damaged or interrupted that the tests try.

python docs/reliability.py               as many cases as the test suite has (some minutes)
DPZOO_FUZZ=20 python docs/reliability.py twenty times as many random ones
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

from dpzoo.files import write_text  # noqa: E402
from tests.tally import HANG, OUTCOMES, TALLY  # noqa: E402

TESTS = ("models/test_inputs.py", "test_checkpoints.py", "test_files.py", "test_fuzz.py")

PAGE = """\
# What happens when something is wrong

The tests give the package odd arguments, and damaged checkpoints, configs and ledgers. They also stop it in
the middle of its writes. Each case has to end in one of four ways; anything else fails the test:

- **clear error**: an error of dpzoo's own, which names the thing, the value got and the value wanted. In
  the commands it is one line and exit status 2 (1 where `convert` compared and found a difference), with
  `--json` an object `{{"ok": false, ...}}`.
- **as stock**: accepted, with the value of stock transformers; for a private step, the value of the rows
  alone.
- **more than stock**: accepted where stock transformers fails, as the docstring says (position ids with a
  dimension of size 1 too many, say).
- **whole**: the old file, folder or account or the new one, and nothing else left.

{table}

Silently wrong is a case whose result differs from stock's or from what was written, and no error says so.
A hang is a case of over {hang} seconds. Lost is a write after which neither the old nor the new can be
read. A flipped bit in a weight cannot be noticed in a stock checkpoint, which has no checksum. (DPTrainer's
checkpoints have one, and refuse it.)

Made with {versions} by

    {command}
"""


def main() -> int:
    """Run the tests, and write the page if they pass."""
    failed = pytest.main(
        [
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-m",
            "slow or not slow",
            *(f"tests/{t}" for t in TESTS),
        ]
    )
    if failed:
        return int(failed)
    kinds = list(dict.fromkeys(kind for kind, _ in TALLY))
    header = ("what is tried", "cases", *OUTCOMES, "silently wrong", "hangs", "lost")
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for kind in kinds:
        found = [TALLY[kind, outcome] for outcome in OUTCOMES]
        lines.append((kind, f"{sum(found):,}", *(f"{n:,}" for n in found), "0", "0", "0"))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    names = ("torch", "transformers", "opacus")
    fuzz = f"DPZOO_FUZZ={os.environ['DPZOO_FUZZ']} " if "DPZOO_FUZZ" in os.environ else ""
    text = PAGE.format(
        table=table,
        hang=HANG,
        versions=", ".join(f"{name} {version(name)}" for name in names),
        command=f"{fuzz}python docs/reliability.py",
    )
    write_text(ROOT / "docs" / "reliability.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
