"""How good generated images are. Read distances.py first.

distances   Fréchet and kernel distance, precision and recall, memorisation: of features alone
features    sets of images, and their features, computed once and kept on disk
inception   the Inception network that FID means
cards       a measurement with its conditions, and several of them side by side
"""

import sys

if sys.argv[0] == "-m":  # python -m metrics.inception
    import harness.interrupt  # noqa: F401
