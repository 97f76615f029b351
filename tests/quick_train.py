"""train.py with few sampling steps and many checkpoints, for tests that need a process of its own."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from machinery import checkpoint  # noqa: E402

QUICK = [(sample, "STEPS", 3), (sample, "GUIDANCE", 0.0), (checkpoint, "SAVE_EVERY", 2)]

if __name__ == "__main__":
    for module, name, value in QUICK:
        setattr(module, name, value)
    train.main()
