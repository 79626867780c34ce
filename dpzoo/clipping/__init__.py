"""Book-keeping: private steps in one backward pass that computes no weight gradient.

`engine` has `PrivacyEngine`. `module` wraps the model and runs the backward pass, `recorder` sees the
torch functions of a forward pass, `use_rules` records uses of parameters, and `factor_store` has their
norms and sums. `optimizer` and `noise` add the noise, `criterion` keeps the rows' losses, `draws` holds
steps to what was drawn, `units` says whose the rows are.
"""

from dpzoo.clipping.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
