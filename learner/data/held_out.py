"""Which demonstrations are held out: never trained on, kept for the gate.

The name alone decides, by its digest, so that the answer is the same in every process, after every restart and
whatever else was imported. A random draw written down in a table was refused: it would be one more thing to lose.
"""

from __future__ import annotations

import hashlib

_HEX_DIGITS = 16


def is_held_out(name: str, share: float) -> bool:
    """Whether what has that name belongs to the held-out share, a number in [0, 1].

    What is held out at one share is held out at every greater one. Raises ValueError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the held-out share must lie in [0, 1], got {share}")
    # Hashed again: the same place in a name's digest may already decide something else, such as a canary's share.
    place = hashlib.sha256(f"held out {name}".encode()).hexdigest()[:_HEX_DIGITS]
    return int(place, 16) < share * 16**_HEX_DIGITS
