"""checkpoint.py -- a run survives kill -9: everything that decides its future, written at once or not at all.

A checkpoint holds the adapter, its average, the optimiser, the random generators, the key of the draws and
the ledger of steps, so that a resumed run repeats bit for bit what an uninterrupted one would have done.
Repeating a step with NEW noise would be a second look at the private data that nobody counted.
The generators' state would give the noise away, so only the owner may read the file, and a finished run deletes it.

  $ python checkpoint.py      # writes, kills the writer half-way, reads
"""
import contextlib
import errno
import hashlib
import io
import os
import re
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor


FINGERPRINTS = ("base", "private_images")                        # compared, never shown
# what a resumed run may change: memory, pictures, places (what lies there is compared by its fingerprint)
FREE = ("chunk", "peek", "save_every", "guidance", "sample_steps", "device", "preset", "data", "data_dir", "size",
        "out", "resume")


def write_atomically(path: Path, write: Callable, mode: int = 0o644) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to the disk, rename it over `path`.

    A crash at any moment leaves the old file or the new one, whole. Errors: OSError, the old file untouched
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)                                  # left by a crash, perhaps readable by others
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise OSError(e.errno or errno.EIO, f"cannot write {path} ({e.strerror or e}); what was there is untouched") from None
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
    write_atomically(path, lambda f: f.write(text.encode()))


def try_writing(folder: Path) -> None:
    """Make `folder`; ValueError now rather than after an hour, if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()                       # a name of its own: others may try at the same moment
    except OSError as e:
        raise ValueError(f"cannot write in {folder} ({os.strerror(e.errno)}); expected a folder, or a place for one") from None


@contextlib.contextmanager
def alone(lock: Path):
    """Inside the `with`, no other program holds `lock`: a file beside what is to be written, with our process's id.

    Two runs in one folder would leave the statement of one beside the adapter of the other, which spent more.
    A crash leaves the lock; on the same machine it is seen that its program has gone. Folders that were made for
    the lock go again if nothing was written in them.
    Errors: held by another program, or no place for it -> ValueError in one line
    """
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
    """Whether the lock's program is known to have ended: it ran here, and no process has its id, or we have."""
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
    """torch.save that only the owner can read, as a checkpoint must be: it holds random state. Errors: OSError"""
    whole = io.BytesIO()                                                 # on a file, torch.save makes a RuntimeError of them
    torch.save(state, whole)
    write_atomically(path, lambda f: f.write(whole.getbuffer()), mode)


def load(path: Path, settings: dict) -> dict:
    """Read a checkpoint, weights only. `settings` must be the ones it was written under: the privacy statement covers
    ONE mechanism, and a run that changes sigma, q, the data or the adapter half-way is another one. What the
    promise does not depend on (FREE) may change: a run that ran out of memory goes on with a smaller chunk.

    Errors: missing, unreadable or written under other settings -> ValueError in one line
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except FileNotFoundError:
        raise ValueError(f"nothing to resume: {path} does not exist (a finished run deletes its checkpoint)") from None
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of this program ({type(e).__name__}); nothing was changed") from None
    compared = sorted((before.keys() | settings.keys()) - set(FREE))
    changed = [f"{k} has changed" if k in FINGERPRINTS else f"{k}: {before.get(k)!r} then, {settings.get(k)!r} now"
               for k in compared if before.get(k) != settings.get(k)]
    if changed:
        raise ValueError(f"cannot resume {path} with other settings ({'; '.join(changed)}): the privacy statement "
                         f"covers one mechanism; resume with the same flags or start in another --out")
    return state


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes. Of private images it is private too: it stays in the owner-only checkpoint."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(str((t.dtype, tuple(t.shape))).encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


# -----------------------------------------------------------------------------
# what a private run consists of


def snapshot(settings: dict, step: int, metrics: list, trainable: dict, average, optimizer, generators: list,
             key: Tensor) -> dict:
    """All of a run's state after `step` steps, as plain tensors, numbers and strings.

    generators: [rank][generator] states; key: of draws.py
    """
    return dict(settings=settings, step=step, metrics=metrics, trainable={k: p.detach() for k, p in trainable.items()},
                average=average.shadow, updates=average.updates, optimizer=optimizer.state_dict(),
                generators=generators, key=key)


def restore(state: dict, trainable: dict, average, optimizer, generators: list, rank: int,
            key: Tensor) -> tuple[int, list]:
    """Put a snapshot back, in place; of the generators, this rank's. Returns (steps done, metrics so far)."""
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(state["trainable"][name])
            average.shadow[name].copy_(state["average"][name])
    average.updates = state["updates"]
    optimizer.load_state_dict(state["optimizer"])
    key.copy_(state["key"])
    for generator, words in zip(generators, state["generators"][rank]):
        generator.set_state(words)
    return state["step"], state["metrics"]


def stop_cleanly() -> threading.Event:
    """An event that the first Ctrl-C sets, so that the step under way is finished and saved; the second one kills."""
    event = threading.Event()

    def on_interrupt(*_):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, on_interrupt)
    return event


if __name__ == "__main__":
    import tempfile
    path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    save(path, dict(settings={"sigma": 1.0}, step=41))

    def killed(f):
        f.write(b"half of step 42")
        raise KeyboardInterrupt
    try:
        write_atomically(path, killed)
    except KeyboardInterrupt:
        pass
    print(f"writer killed half-way; the file still says step {load(path, {'sigma': 1.0})['step']}, "
          f"mode {path.stat().st_mode & 0o777:o}")
    try:
        load(path, {"sigma": 0.5})
    except ValueError as e:
        print("resumed with less noise:", e)
