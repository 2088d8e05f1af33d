"""Seeds: what torch's generators are given for a user's, so that each is a seed of its own.

    torch.manual_seed(torch_seed(seed))
    torch.manual_seed(step_seed(seed, position))      # one of the streams of a run

torch's CPU generator looks at the low 32 bits only, so larger seeds are hashed. Smaller ones are
taken as they are. NumPy's generators look at all of a seed and need none of this.
"""

import hashlib


SMALL = 2**32  # seeds below are known to all of torch's generators


def torch_seed(seed: int) -> int:
    """What torch.manual_seed is given for a seed from 0 on."""
    return seed if seed < SMALL else hashed(f"seed {seed}")


def step_seed(seed: int, position: int) -> int:
    """The same for what is drawn from sample `position` of a run on."""
    if seed < SMALL:
        return seed * 1_000_003 + position
    return hashed(f"seed {seed} position {position}")


def hashed(text: str) -> int:
    """A number of 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
