"""Write jax_privacy.json: what jax_privacy's CanaryScoreAuditor says of made scores.

    python tests/empirical/record_jax_privacy.py            # with jax-privacy and dp-accounting installed

Its auditing module needs numpy, scipy and dp-accounting only; its others, and jax, are not imported.
Its root search stops at 1e-6; here it goes on to 1e-13, so that the record has the values themselves.
"""

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import scipy.optimize


def auditing() -> types.ModuleType:
    root = Path(str(importlib.metadata.distribution("jax-privacy").locate_file("jax_privacy")))
    package = types.ModuleType("jax_privacy")
    package.__path__ = [str(root)]
    sys.modules["jax_privacy"] = package
    module = importlib.import_module("jax_privacy.auditing")
    search = scipy.optimize.brentq
    module.scipy = types.SimpleNamespace(
        optimize=types.SimpleNamespace(brentq=lambda f, a, b, xtol: search(f, a, b, xtol=1e-13)),
        special=module.scipy.special,
        stats=module.scipy.stats,
    )
    return module


def main() -> None:
    module, rng, cases = auditing(), np.random.default_rng(0), []
    for canaries, mu in ((50, 1.0), (256, 0.3), (256, 2.0), (1000, 1.0), (1000, 5.0)):
        coins = rng.random(canaries) < 0.5
        scores = rng.normal(size=canaries) + mu * coins
        judge = module.CanaryScoreAuditor(scores[coins], scores[~coins])
        for guesses in (canaries // 16, canaries // 2):
            threshold = np.sort(scores)[-guesses]
            options = {"threshold_strategy": module.Explicit(threshold)}
            for delta, significance in ((1e-5, 0.05), (1e-3, 0.01)):
                cases.append(
                    {
                        "canaries": canaries,
                        "guesses": guesses,
                        "correct": int((coins & (scores >= threshold)).sum()),
                        "delta": delta,
                        "significance": significance,
                        "one_run": float(judge.epsilon_one_run(significance, delta, **options)),
                        "one_run_fdp": float(
                            judge.epsilon_one_run_fdp(significance, delta, **options)
                        ),
                    }
                )
    version = importlib.metadata.version("jax-privacy")
    record = {"jax-privacy": version, "cases": cases}
    Path(__file__).with_name("jax_privacy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
