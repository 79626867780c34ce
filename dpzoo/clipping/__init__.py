"""Book-keeping: private steps in one backward pass that computes no weight gradient.

`engine` is the door; `module` taps the layers and runs the backward pass, `uses` and `book` do the
mathematics, `optimizer` and `noise` add the noise, `loss` keeps the rows' losses, `draws` holds steps to
what was drawn, `units` says whose the rows are.
"""

from dpzoo.clipping.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
