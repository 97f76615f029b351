"""train.py with few sampling steps, many checkpoints and a coarse PLD, for tests that need their own process.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from machinery import checkpoint, pld  # noqa: E402

# a grid of 3^9 points: epsilon_pld is a bound as well, a little looser, in a fraction of a second
QUICK = [(sample, "STEPS", 3), (sample, "GUIDANCE", 0.0), (checkpoint, "SAVE_EVERY", 2),
         (pld, "PLD_POINTS", 3**9)]

if __name__ == "__main__":
    for module, name, value in QUICK:
        setattr(module, name, value)
    train.main()
