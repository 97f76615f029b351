"""kill.py -- kill -9 at random moments, resume, compare: bit for bit the run that was never killed.

  $ python tests/faults/kill.py --kills 20         # about a minute; exit code 1 if a single byte differs

Each trial is one small run with --seed, killed once or several times anywhere between its first line and its
last file, resumed each time, and then compared with an uninterrupted one. The runs are forks of this process:
torch is imported once, before any of its threads exists.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: E402, F401  (puts the repository on the path)
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the first optimizer imports it, for seconds: once, here)
import train  # noqa: E402
import helpers  # noqa: E402
from machinery import checkpoint  # noqa: E402


def start(out: str, *flags: str) -> int:
    """Fork a child that runs train.py with these flags, its words going to OUT.log; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        for module, name, value in helpers.QUICK:
            setattr(module, name, value)
        sys.argv = ["train.py", *helpers.FLAGS, "--steps", "16", "--seed", "7", "--out", out, *flags]
        train.main()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def files(out: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(out).iterdir()}


def trial(name: str, kills: int, seconds: float, rng: random.Random) -> int:
    """One run, killed up to `kills` times within its first `seconds`, then finished; the number of kills."""
    done = 0
    while True:
        # killed before its first checkpoint: from the start; after its last file: finished, the lock is left
        flags = ["--resume"] if Path(name, "checkpoint.pt").exists() else []
        if Path(name, "privacy.json").exists() and not flags:
            with checkpoint.alone(Path(name, ".in-use")):                # whoever comes next clears it away
                return done
        child = start(name, *flags)
        if done < kills:
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)                               # our own child, by its id
        status, said = os.waitpid(child, 0)[1], Path(name + ".log")
        if os.WIFSIGNALED(status):
            done += 1
        elif status == 0:
            return done
        else:                                                            # killed in the midst of the removal
            assert "the run is finished" in said.read_text().splitlines()[-1], \
                f"exit status {status}:\n{said.read_text()}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20, help="at least this many")
    p.add_argument("--seed", type=int, default=None,
                   help="of the moments, to see a failure again (default: by the clock)")
    a = p.parse_args()
    seed = a.seed if a.seed is not None else int(time.time())
    rng = random.Random(seed)
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="kill-")
    os.chdir(helpers.make_place(Path(folder)))
    begin = time.time()
    assert os.waitpid(start("whole"), 0)[1] == 0, Path("whole.log").read_text()
    seconds, whole, killed, trials = time.time() - begin, files("whole"), 0, 0
    assert set(whole) == set(helpers.PUBLISHED), sorted(whole)
    while killed < a.kills:
        trials += 1
        killed += trial(f"run-{trials}", min(rng.randint(1, 3), a.kills - killed), seconds, rng)
        got = files(f"run-{trials}")
        wrong = sorted(name for name in whole.keys() | got.keys() if whole.get(name) != got.get(name))
        if wrong:
            sys.exit(f"run-{trials} in {folder} differs from `whole` in {', '.join(wrong)} "
                     f"(moments: --seed {seed})")
    shutil.rmtree(folder)
    print(f"{killed} kills in {trials} runs of {seconds:.1f} s: "
          "every file is the uninterrupted run's, bit for bit")


if __name__ == "__main__":
    main()
