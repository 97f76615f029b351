"""checkpoint.py -- a run survives kill -9: everything that decides its future, written at once or not at all.

A checkpoint holds the adapter, its average, the optimiser, the key of the draws and the ledger of steps. It
holds no secret of the noise: a run with --seed makes its key again from the seed, and goes on bit for bit on
a CPU with the same --chunk; a private run that is resumed draws a fresh key for the steps from there on, so
two continuations of one checkpoint have no noise in common. A step that ran and was lost with the process
was shown to nobody, so running it again with other noise is no second look at the private images, unless what
killed the process depended on that step: too little memory for a large batch, or a time limit.
Only the owner may read a checkpoint: it holds a fingerprint of the private images. A finished run deletes it.

  $ python -m machinery.checkpoint      # writes, kills the writer half-way, reads
"""
import contextlib
import errno
import hashlib
import io
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from machinery import distributed, screen

SAVE_EVERY = 25              # steps between checkpoints: what a crash can cost
SECONDS = 60                 # and the time after which one is due all the same
FINGERPRINTS = ("base", "private_images")                        # compared, never shown
# what a resumed run may change: memory, pictures, places (what lies there is compared by its fingerprint)
FREE = ("chunk", "peek", "device", "data", "data_dir", "size", "out", "resume")


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a temporary file beside `path`, flush it to the disk, rename it over `path`.

    A crash at any moment leaves the old file or the new one, whole. Errors: OSError, the old file untouched
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)                          # left by a crash, perhaps readable by others
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise OSError(e.errno or errno.EIO, f"cannot write {path} ({e.strerror or e}); what was there is "
                                            f"untouched") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):                                   # Windows cannot, nor can some disks
        folder = os.open(path.parent, os.O_RDONLY)                       # the rename must survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def try_writing(folder: Path) -> None:
    """Make `folder`; ValueError now rather than after an hour, if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:            # a name of its own: others may try, too
            f.write(b"a full disk still takes an empty file")
    except OSError as e:
        raise ValueError(f"cannot write in {folder} ({os.strerror(e.errno)}); expected a folder to write in, "
                         f"or a place for one") from None


@contextlib.contextmanager
def alone(lock: Path, fresh: bool = False):
    """Inside the `with`, no other program holds `lock`: a file beside what is to be written, with our process
    id. Of several ranks the first holds it for all.

    Two runs in one folder would leave the privacy report of one beside the adapter of the other, which spent more.
    A crash leaves the lock; on the same machine it is seen that its program has gone. Folders that were made
    for the lock go again if nothing was written in them. fresh: the folder must not hold a run either.
    Errors: held by another program, or no place for it, or a run there -> ValueError in one line
    """
    if not distributed.first():
        yield
        return
    lock, host = Path(lock), socket.gethostname()
    words = f"process {os.getpid()} on {host}"
    made = [folder for folder in lock.parents if not folder.exists()]    # innermost first
    try:
        try_writing(lock.parent)
        with contextlib.ExitStack() as held:
            try:
                if _abandoned(lock, host):
                    with _new(lock.with_name(lock.name + ".old"), words):    # one at a time clears it away
                        if _abandoned(lock, host):
                            lock.unlink()
                held.enter_context(_new(lock, words))
            except FileExistsError as e:
                owner = _read(e.filename) or "another program"
                raise ValueError(f"{lock.parent} is in use by {owner}; wait for it or choose another place; "
                                 f"if that is no program of ours, remove {e.filename}") from None
            if fresh:
                prepare_folder(lock.parent)
            yield
    finally:
        with contextlib.suppress(OSError):                               # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _new(path: Path, words: str):
    """A file that did not exist before, for as long as the `with` lasts; FileExistsError if it did."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "w") as f:
            f.write(words)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text()
    return ""


def _abandoned(lock: Path, host: str) -> bool:
    """Whether the lock's program is known to have ended: it ran here, and nobody has its id, or we have."""
    there = re.fullmatch(rf"process (\d+) on {re.escape(host)}", _read(lock))
    if not there or os.name == "nt":                                     # Windows has no harmless way to ask
        return False
    with contextlib.suppress(PermissionError):                           # somebody else's process: it lives
        if int(there[1]) == os.getpid():                             # a container's first process, restarted
            return True
        try:
            os.kill(int(there[1]), 0)
        except ProcessLookupError:
            return True
    return False


def save(path: Path, state: dict, mode: int = 0o600) -> None:
    """torch.save that only the owner can read, as a checkpoint must be.

    Errors: OSError (on a file, torch.save makes a RuntimeError of it)
    """
    whole = io.BytesIO()
    torch.save(state, whole)
    write_bytes(path, whole.getbuffer(), mode)


def load(path: Path, settings: dict) -> dict:
    """Read a checkpoint, weights only, if it was written under these `settings`.

    The privacy report covers ONE mechanism: a run that changes sigma, q, the data or the adapter half-way is
    another one. What no promise depends on (FREE) may change: out of memory, it goes on with a smaller chunk.

    Errors: missing, unreadable or written under other settings -> ValueError in one line
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except FileNotFoundError:
        why = "no step was saved there: check --out, or start without --resume"
        if path.with_name("privacy.json").exists():
            why = "a finished run deletes its checkpoint"
        raise ValueError(f"nothing to resume: {path} does not exist ({why})") from None
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of this program ({screen.cause(e)}); nothing was "
                         f"changed") from None
    compared = sorted((before.keys() | settings.keys()) - set(FREE))
    changed = []
    for k in compared:
        if before.get(k) != settings.get(k) and k in FINGERPRINTS:
            changed.append(f"{k} has changed")
        elif before.get(k) != settings.get(k):
            changed.append(f"{k}: {before.get(k)!r} then, {settings.get(k)!r} now")
    if changed:
        raise ValueError(f"cannot resume {path} with other settings ({'; '.join(changed)}): one run is "
                         f"one mechanism; resume with the same flags or start in another --out")
    return state


def shred(path: Path) -> None:
    """Overwrite a checkpoint with zeros, then remove it.

    Blocks of earlier checkpoints, which the disk has freed when a newer one took their place, are not
    reached. They hold no key, but a fingerprint of the private images.
    """
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
        f.flush()
        os.fsync(f.fileno())
    path.unlink()


def finish_shredding(path: Path) -> None:
    """Remove a checkpoint that `shred` had begun to overwrite when its process was killed.

    Errors: it was so, hence there is nothing to resume -> ValueError
    """
    if not path.is_file() or not path.with_name("privacy.json").is_file():
        return
    with open(path, "rb") as f:
        overwritten = f.read(1) == b"\0"                                 # what `save` writes begins with PK
    if overwritten:
        if distributed.first():
            shred(path)
        raise ValueError(f"nothing to resume: the run is finished; what was left of {path} is removed now")


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes. Of private images it is private too: it stays in the checkpoint."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(str((t.dtype, tuple(t.shape))).encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


# -----------------------------------------------------------------------------
# a private run in its folder


def prepare_folder(out: Path) -> None:
    """Make the run's folder; refuse to write over another run."""
    known = ("privacy.json", "checkpoint.pt", "adapter_model.bin", "adapter_config.json", "config.json",
             "metrics.csv", "samples.png")
    mine = [name for name in known if (out / name).exists()]
    mine += sorted(strip.name for strip in out.glob("peek-*.png"))       # of a killed run: they count
    if mine:
        hint = "--resume goes on with it, or choose" if "checkpoint.pt" in mine else "choose"
        raise ValueError(f"{out} already holds a run ({', '.join(mine)}); nothing was overwritten; "
                         f"{hint} another --out")
    try_writing(out)


class Progress:
    """How far a private run has come: the ledger of its steps, and what decides its future, in
    folder/checkpoint.pt.

    settings:  of the mechanism, compared on --resume
    trainable: name -> tensor, with their running `average` (ddpm.EMA) and their `optimizer`
    key:       of draws.py
    """

    def __init__(self, folder: Path, settings: dict, trainable: dict, average, optimizer, key: Tensor):
        self.folder, self.settings = Path(folder), settings
        self.trainable, self.average = trainable, average
        self.optimizer, self.key = optimizer, key
        self.done, self.metrics = 0, []                          # steps; of each: its number, epsilon, order
        self.saved, self.stop = time.monotonic(), threading.Event()

    def begin(self, resume: bool) -> None:
        """An empty folder; or everything taken back as it was, in place."""
        if not resume:
            if distributed.rank() == 0:
                prepare_folder(self.folder)
            return
        finish_shredding(self.folder / "checkpoint.pt")
        state = load(self.folder / "checkpoint.pt", self.settings)
        distributed.agree(dict(checkpoint=fingerprint(state["key"], *state["trainable"].values())))
        with torch.no_grad():
            for name, p in self.trainable.items():
                p.copy_(state["trainable"][name])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.key.copy_(state["key"])
        self.done, self.metrics = state["step"], state["metrics"]

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are still to be done. After Ctrl-C the step under way is the last."""
        if distributed.ranks() == 1:
            self.stop = stop_cleanly()
        for step in range(self.done + 1, total + 1):
            yield step
            if self.stop.is_set():
                sys.exit(f"stopped after step {step} of {total}, epsilon spent so far "
                         f"{self.metrics[-1][1]:.4f}; go on with --resume")
        if distributed.ranks() == 1:
            screen.answer_signals()

    @contextlib.contextmanager
    def ending(self):
        """Inside the `with` the run's files are written, after its last step. Ctrl-C ends that at once."""
        try:
            with screen.waiting(f"writing the files of {self.folder}, samples.png among them,"):
                yield
        except KeyboardInterrupt:
            sys.exit(f"stopped while the files of {self.folder} were written: all {len(self.metrics)} steps "
                     f"are done and in its checkpoint; --resume finishes it")

    def record(self, step: int, total: int, epsilon: float, order: float, save: bool = False) -> None:
        """Enter a step that ran into the ledger, with the epsilon spent so far; a checkpoint when it is due:
        asked for, every SAVE_EVERY steps, a minute after the last one, at the end, after Ctrl-C and its like.
        """
        self.metrics.append([step, epsilon, order])
        if distributed.rank() != 0:
            return
        screen.tell_a_log(step, total, f"epsilon_rdp={epsilon:.3f}")
        late = time.monotonic() - self.saved > SECONDS
        if save or late or step % SAVE_EVERY == 0 or step == total or self.stop.is_set():
            self.save(step)
            self.saved = time.monotonic()

    def save(self, step: int) -> None:
        """All of it, as plain tensors, numbers and strings."""
        weights = {name: p.detach() for name, p in self.trainable.items()}
        save(self.folder / "checkpoint.pt", dict(
            settings=self.settings, step=step, metrics=self.metrics, trainable=weights,
            average=self.average.state_dict(), optimizer=self.optimizer.state_dict(), key=self.key))


def stop_cleanly() -> threading.Event:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets: the step under way is finished and saved.

    A second Ctrl-C kills. A second SIGTERM or SIGHUP does not: a terminal that closes may send two.
    """
    event = threading.Event()

    def on_signal(*_):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in screen.signals():
        signal.signal(number, on_signal)
    return event


if __name__ == "__main__":
    path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    save(path, dict(settings={"sigma": 1.0}, step=41))

    def killed(*_):
        raise KeyboardInterrupt
    os.fsync, real = killed, os.fsync
    try:
        save(path, dict(settings={"sigma": 1.0}, step=42))
    except KeyboardInterrupt:
        os.fsync = real
    print(f"writer killed half-way; the file still says step {load(path, {'sigma': 1.0})['step']}, "
          f"mode {path.stat().st_mode & 0o777:o}")
    try:
        load(path, {"sigma": 0.5})
    except ValueError as e:
        print("resumed with less noise:", e)
