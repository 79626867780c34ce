"""dpzoo's version, what the tests were run with (docs/versions.md), and the warning of anything else."""

import warnings
from importlib.metadata import version as installed

from packaging.specifiers import SpecifierSet

__version__ = "0.1.0"

TRANSFORMERS = ">=5.20.2,<5.25"
"""The versions of transformers that the tests were run with; pyproject.toml says the same."""


def warn_if_untested(version: str = installed("transformers")) -> None:
    """Warn, by name, of a transformers outside `TRANSFORMERS`. `import dpzoo` calls it, once.

    The models follow transformers' code, and are compared with it by the tests. With another version they
    may differ from the stock ones, or not build at all. `UserWarning`, and no error: a user may have to.
    """
    if not SpecifierSet(TRANSFORMERS).contains(version, prereleases=True):
        warnings.warn(
            f"dpzoo was not tested with transformers {version}, but with {TRANSFORMERS}: its models may "
            f"differ from the stock ones there. Install a version of that range, or run dpzoo's tests "
            f"(make test) with this one.",
            stacklevel=4,  # the line that imports dpzoo
        )


warn_if_untested()
