"""checkpoint.py -- a run survives kill -9: all that decides its future is written as a whole or not at all.

A checkpoint holds the adapter, its running average, the optimiser, the key of the draws and the ledger of
steps. It holds no secret of the privacy noise. A run with --seed makes its key again from the seed, and
continues bit for bit on a CPU with the same --chunk. A private run that is resumed draws a fresh key for the
steps from there on, so two continuations of one checkpoint have no noise in common.

A step that was lost with its process was shown to nobody, so running it again with other noise is no second
look at the private images. The exception is a process that ended because of that very step: because a large
batch needed too much memory, or because of a time limit.

Only the owner may read a checkpoint, because it holds a fingerprint of the private images. A finished run
deletes it.

  $ python -m machinery.checkpoint      # writes a file, kills the writer half-way, reads the file
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

SAVE_EVERY = 25              # steps between checkpoints: the most that a crash can cost
SECONDS = 60                 # a checkpoint is also due when the last one is older than this
FINGERPRINTS = ("base", "private_images", "code")                # they are compared, and never shown
# Settings that a resumed run may change, since they concern memory, pictures or places of files only. Images
# at another place must have the same fingerprint.
FREE = ("chunk", "peek", "device", "data", "data_dir", "size", "out", "resume")


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    A crash at any moment leaves the old file or the new one, whole.
    Errors: OSError, which leaves the old file untouched
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)                          # a crash may leave one that others can read
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
    with contextlib.suppress(OSError):                                   # Windows and some disks cannot
        folder = os.open(path.parent, os.O_RDONLY)                       # the rename must survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def try_writing(folder: Path) -> None:
    """Make `folder`. If nothing can be written in it, raise ValueError now rather than after an hour."""
    trial = folder / f".try-{os.getpid()}"                               # its own name: others may try, too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"a full disk still takes an empty file")
    except OSError as e:
        raise ValueError(f"cannot write in {folder} ({os.strerror(e.errno)}); expected a folder to write in, "
                         f"or a place where one can be made") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


@contextlib.contextmanager
def alone(lock: Path, fresh: bool = False):
    """Inside the `with`, no other program holds `lock`, a file with our process id beside what is written.

    Two runs in one folder would leave the privacy report of one beside the adapter of the other, which may
    have spent more. A crash leaves the lock behind; on the same machine it is recognised that its program
    has ended. Folders that were made for the lock are removed if nothing was written in them. Of several
    ranks, the first holds the lock for all.
    fresh:  the folder must not hold a run either
    Errors: a lock of another program, no place for one, or a run in the folder -> ValueError in one line
    """
    if not screen.first():
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
                    with _new(lock.with_name(lock.name + ".old"), words):    # one at a time removes it
                        if _abandoned(lock, host):
                            lock.unlink()
                held.enter_context(_new(lock, words))
            except FileExistsError as e:
                owner = _read(e.filename) or "another program"
                raise ValueError(f"{lock.parent} is in use by {owner}; wait for it, or choose another place. "
                                 f"If that is not a run of this project, remove {e.filename}") from None
            if fresh:
                prepare_folder(lock.parent)
            yield
    finally:
        with contextlib.suppress(OSError):                              # stops at the first that is not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _new(path: Path, words: str):
    """A file that exists only as long as the `with` lasts. FileExistsError if it existed before."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "w") as f:
            _hold(f)
            f.write(words)
            f.flush()
            yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _hold(f) -> bool:
    """Lock an open file until it is closed. Returns: False if another program holds the lock

    The kernel releases the lock of a program that has ended. So it can be seen from another container, too,
    that a lock is held, although process ids differ there.
    """
    if os.name == "nt":
        return True
    import fcntl
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                                                      # a file system without such locks
        pass
    return True


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text()
    return ""


def _abandoned(lock: Path, host: str) -> bool:
    """Whether the lock's program is known to have ended: it ran here, and its id is free or is our own."""
    there = re.fullmatch(rf"process (\d+) on {re.escape(host)}", _read(lock))
    if not there or os.name == "nt":                                     # Windows has no harmless way to ask
        return False
    # PermissionError: it is another user's program, which runs. FileNotFoundError: the lock was removed
    with contextlib.suppress(PermissionError, FileNotFoundError):
        with open(lock) as f:
            if not _hold(f):
                return False
        if int(there[1]) == os.getpid():                             # a container's first process, restarted
            return True
        try:
            os.kill(int(there[1]), 0)
        except ProcessLookupError:
            return True
    return False


def save(path: Path, state: dict, mode: int = 0o600) -> None:
    """torch.save to a file that only the owner can read, as a checkpoint must be.

    Errors: OSError (torch.save itself would raise RuntimeError)
    """
    whole = io.BytesIO()
    torch.save(state, whole)
    write_bytes(path, whole.getbuffer(), mode)


def load(path: Path, settings: dict) -> dict:
    """Read a checkpoint, weights only, if it was written under these `settings`.

    The privacy report covers ONE mechanism. A run that changes sigma, q, the data or the adapter half-way is
    another one. Settings on which no guarantee depends (FREE) may change: a run that was out of memory can
    continue with a smaller chunk.
    Errors: a checkpoint that is missing, unreadable or of other settings -> ValueError in one line
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
        raise ValueError(f"cannot resume {path} with other settings ({'; '.join(changed)}); resume with the "
                         f"same flags and the same version of the code, or start in another --out")
    return state


def shred(path: Path) -> None:
    """Overwrite a checkpoint with zeros, then remove it.

    This does not reach the blocks of earlier checkpoints, which the disk freed when a newer one took their
    place. They hold no key of the noise, but they hold a fingerprint of the private images.
    """
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))
        f.flush()
        os.fsync(f.fileno())
    path.unlink()


def finish_shredding(path: Path) -> None:
    """Remove a checkpoint that `shred` had begun to overwrite when its process was killed.

    Errors: there was one, so there is nothing to resume -> ValueError
    """
    if not path.is_file() or not path.with_name("privacy.json").is_file():
        return
    with open(path, "rb") as f:
        overwritten = f.read(1) == b"\0"                                 # what `save` writes begins with PK
    if overwritten:
        if screen.first():
            shred(path)
        raise ValueError(f"nothing to resume: the run is finished, and what was left of {path} is removed")


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes. That of private images is private, too: it stays in the checkpoint."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(str((t.dtype, tuple(t.shape))).encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


# -----------------------------------------------------------------------------
# a private run in its folder


def prepare_folder(out: Path) -> None:
    """Make the folder of a run, and refuse to write over another run."""
    known = ("privacy.json", "checkpoint.pt", "adapter_model.bin", "adapter_config.json", "config.json",
             "metrics.csv", "samples.png", "evaluation.json", "neighbours.png")
    mine = [name for name in known if (out / name).exists()]
    mine += sorted(strip.name for strip in out.glob("peek-*.png"))       # also of a killed run
    if mine:
        hint = "--resume goes on with it, or choose" if "checkpoint.pt" in mine else "choose"
        raise ValueError(f"{out} already holds a run ({', '.join(mine)}), and nothing was overwritten; "
                         f"{hint} another --out")
    try_writing(out)


class Progress:
    """How far a private run has come: the ledger of its steps and all that decides its future.

    It is kept in folder/checkpoint.pt.
    settings:  those of the mechanism, which --resume compares
    trainable: name -> tensor; `average` (ddpm.EMA) is their running average and `optimizer` trains them
    key:       the key of draws.py
    """

    def __init__(self, folder: Path, settings: dict, trainable: dict, average, optimizer, key: Tensor):
        self.folder, self.settings = Path(folder), settings
        self.trainable, self.average = trainable, average
        self.optimizer, self.key = optimizer, key
        self.done, self.metrics = 0, []                          # steps; (step, epsilon, order) of each
        self.saved, self.stop = time.monotonic(), threading.Event()

    def begin(self, resume: bool) -> None:
        """Start in an empty folder, or, to resume, restore everything as it was, in place."""
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
        """The numbers of the steps that remain. After Ctrl-C the step under way is the last one."""
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
        """Inside the `with`, the files of a run are written after its last step. Ctrl-C ends that at once."""
        try:
            with screen.waiting(f"writing the files of {self.folder}, samples.png among them,"):
                yield
        except KeyboardInterrupt:
            sys.exit(f"stopped while the files of {self.folder} were written: all {len(self.metrics)} steps "
                     f"are done and in its checkpoint; --resume finishes the run")

    def record(self, step: int, total: int, epsilon: float, order: float, save: bool = False) -> None:
        """Enter a finished step into the ledger, with the epsilon spent so far. Write a checkpoint when due.

        It is due if `save` asks for it, every SAVE_EVERY steps, SECONDS after the last one, at the end, and
        after Ctrl-C or a similar signal.
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
        """Write all of it, as plain tensors, numbers and strings."""
        weights = {name: p.detach() for name, p in self.trainable.items()}
        save(self.folder / "checkpoint.pt", dict(
            settings=self.settings, step=step, metrics=self.metrics, trainable=weights,
            average=self.average.state_dict(), optimizer=self.optimizer.state_dict(), key=self.key))


def stop_cleanly() -> threading.Event:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets. The step under way is then finished and saved.

    A second Ctrl-C ends the program at once. A second SIGTERM or SIGHUP does not, because a terminal that
    closes may send two.
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
    real = os.fsync
    os.fsync = killed
    try:
        save(path, dict(settings={"sigma": 1.0}, step=42))
    except KeyboardInterrupt:
        os.fsync = real
    print(f"the writer was killed half-way; the file still says step {load(path, {'sigma': 1.0})['step']}, "
          f"and its mode is {path.stat().st_mode & 0o777:o}")
    try:
        load(path, {"sigma": 0.5})
    except ValueError as e:
        print("with less noise it is refused:", e)
