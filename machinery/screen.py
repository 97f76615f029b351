"""screen.py -- what a program says: one line when it fails; in a log file ten lines of progress, and no bar.

  $ python -m machinery.screen | head -1     # its reader goes away; the work goes on
"""
import argparse
import contextlib
import math
import os
import pickle
import re
import signal
import struct
import sys
import threading
import time
import zipfile
import zlib
from typing import Iterable, Iterator

PATIENCE = 5.0               # seconds of silence before a line says what takes so long
AGAIN = 60.0                 # and between that line and the next
# a batch system's time limit, its warning and its limit of seconds; a terminal that closes, on Windows too
ENDINGS = ("SIGTERM", "SIGUSR1", "SIGXCPU", "SIGHUP", "SIGBREAK")


class Parser(argparse.ArgumentParser):
    """Flags with their defaults in --help, under the first line of the program's docstring; one that is wrong
    ends the program in one line. A ~ that the shell has left in a path is expanded here.
    """

    def __init__(self, doc: str, prog: str | None = None):
        ready()
        super().__init__(prog=prog, description=doc.splitlines()[0],
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        said, rest = super().parse_known_args(args, namespace)
        for name, value in vars(said).items():
            if isinstance(value, list):
                setattr(said, name, [at_home(v) for v in value])
            elif name not in NAMES:
                setattr(said, name, at_home(value))
        return said, rest

    def error(self, message: str) -> None:
        fail(self.prog, 2, message)


NAMES = ("classes", "start")     # flags that hold the names of classes, not a path


def at_home(value):
    """A path without the ~ that the shell leaves in `--out=~/run` and `folder:~/pics`; else as it is."""
    if isinstance(value, os.PathLike):
        return type(value)(os.path.expanduser(value))
    if not isinstance(value, str):
        return value
    kind, place = re.fullmatch(r"((?:folder|npz):)?(.*)", value, re.S).groups("")
    return kind + os.path.expanduser(place)


# -----------------------------------------------------------------------------
# stdout and stderr


def ready() -> None:
    """Make stdout and stderr fit for any word: a letter that the encoding lacks becomes a backslash and a
    number, and a stream that was closed (`>&-`) leads nowhere. Each line is said at once, in a log file too,
    where stderr's lines stand between them. Done by Parser and one_line, more than once.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:                                          # else the next file would get this number,
            os.open(os.devnull, os.O_RDWR)                       # and with it the words of C libraries
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


class _Unread:
    """A stream that goes on when its reader has gone, as in `train.py | head`, or when its disk is full.

    lost: what became of the words, if they should have been kept
    """

    def __init__(self, stream):
        self.stream, self.lost = stream, None

    def write(self, text: str) -> int:
        with self._to_nowhere():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._to_nowhere():
            self.stream.flush()

    @contextlib.contextmanager
    def _to_nowhere(self):
        try:
            yield
        except OSError as e:                                         # once: from now on all words go there
            if not isinstance(e, BrokenPipeError):
                self.lost = e
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def out_of_memory(e: BaseException) -> bool:
    """Whether `e` says so: CUDA has a class for it, a CPU and Apple's GPU have a sentence.

    The class by its name: accountant.py speaks through this file and needs no torch.
    """
    words = f"{type(e).__name__}: {e}"
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and any(
        said in words for said in ("OutOfMemoryError", "out of memory", "can't allocate memory"))


@contextlib.contextmanager
def one_line(program: str, memory: str):
    """Whatever ends the program inside ends it in one line on stderr: bad input and a failing disk with exit
    code 2, too little memory with 1 (and `memory`, what to lower), Ctrl-C with 130, SIGTERM with 143. Our own
    errors keep their traceback.
    """
    ready()
    before = sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in signals()}
    sys.stdout, sys.stderr = _Unread(sys.stdout), _Unread(sys.stderr)
    answer_signals()
    try:
        yield
        sys.stdout.flush()
        if sys.stdout.lost is not None:
            fail(program, 2, f"what it had to say is lost ({sys.stdout.lost.strerror}); its work is done")
    except (ValueError, OSError) as e:
        fail(program, 2, str(e))
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        fail(program, 128 + number, f"interrupted{by}; what was written before is whole, nothing else was "
                                    f"written")
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        first = (str(e) or "no more to be had").splitlines()[0][:150]
        fail(program, 1, f"out of memory ({first}); {memory}")
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signals() -> list[int]:
    """Ctrl-C and what else asks a program to end, as far as it exists here and is not ignored: nohup ignores
    SIGHUP. Only a program's first thread has any.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
    return [signal.SIGINT] + [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def answer_signals() -> None:
    """From here on each of them is a KeyboardInterrupt, at once."""
    def interrupt(number, _):
        raise KeyboardInterrupt(number)
    for number in signals():
        if number != signal.SIGINT:
            signal.signal(number, interrupt)
        elif signal.getsignal(number) != signal.SIG_IGN:             # a script's background job ignores it
            signal.signal(number, signal.default_int_handler)


def fail(program: str, code: int, message: str) -> None:
    sys.stdout.flush()
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def count(n: int, thing: str) -> str:
    """1 file, 2 files, 60,000 files."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def cause(e: BaseException) -> str:
    """Why a file could not be read, in words: an exception's class is a name for programmers."""
    words = " ".join(str(e).split())
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    if isinstance(e, (EOFError, zlib.error, zipfile.BadZipFile, struct.error)) or "zip archive" in words:
        return "it is cut off, damaged or another kind of file"
    if isinstance(e, pickle.UnpicklingError) or "weights_only" in words:
        return "it is damaged, another kind of file, or holds code, which is never run"
    if "cannot identify image file" in words:
        return "no kind of picture that can be read here"
    if "loading state_dict" in words:
        return "its weights have other names or shapes"
    if isinstance(e, KeyError):
        return f"it lacks {words}"
    if isinstance(e, UnicodeDecodeError) or "(char " in words:           # json's errors end so
        return "it is cut off or another kind of text"
    if isinstance(e, MemoryError):
        return "it is too large for the memory"
    if isinstance(e, (TypeError, AttributeError)) or not words:      # what was found is of another form
        return "it holds something else"
    return words[:300]


# -----------------------------------------------------------------------------
# waits: a bar on a terminal; in a log file, which would keep every state of a bar, lines


def hide_bar(wanted: bool = True) -> bool | None:
    """tqdm's `disable`. True: no bar, as we or TQDM_DISABLE want it; None: a bar unless stderr is a file.

    Of several ranks (torchrun) the first alone has bars.
    """
    asked = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return True if asked or not wanted or not first() else None


def first() -> bool:
    """Whether this process is the one that speaks: of several ranks the first."""
    return os.environ.get("RANK", "0") == "0"


def tell_a_log(step: int, steps: int, figures: str) -> None:
    """Where a log file hides the bar: a line of plain text after every tenth of the steps."""
    if hide_bar() is None and not sys.stderr.isatty() and step % math.ceil(steps / 10) == 0:
        print(f"step {step} of {steps}, {figures}", file=sys.stderr)


class waiting:
    """Inside the `with`, a line on stderr says what takes so long: after PATIENCE seconds, then every AGAIN
    seconds. Nothing is said where bars are hidden, or where a terminal shows one (has_bar).

        with screen.waiting("drawing samples.png"): ...
        ->  drawing samples.png takes a while (5 s so far)
    """

    def __init__(self, what: str, total: int | None = None, has_bar: bool = False, wanted: bool = True):
        self.what, self.done, self.total = what, 0, total
        self.silent = hide_bar(wanted) is True or has_bar and sys.stderr.isatty()
        self.over = threading.Event()

    def __enter__(self) -> "waiting":
        self.start = time.monotonic()
        if not self.silent:
            threading.Thread(target=self._speak, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    def _speak(self) -> None:
        patience = PATIENCE
        while not self.over.wait(patience):
            how_far = f", {self.done:,} of {self.total:,}" if self.total else ""
            print(f"{self.what} takes a while{how_far} ({time.monotonic() - self.start:.0f} s so far)",
                  file=sys.stderr)
            patience = AGAIN


def bar(things: Iterable, what: str, unit: str, wanted: bool = True, total: int | None = None) -> Iterator:
    """`things` one by one under a bar, if they take more than a second; in a log `waiting` speaks.

    total: how many there are, where they have no len()
    """
    from tqdm import tqdm                                        # here: accountant.py has no bar
    total = len(things) if total is None else total
    shown = tqdm(things, desc=what, unit=unit, total=total, delay=1, leave=None, disable=hide_bar(wanted))
    with waiting(what, total, has_bar=True, wanted=wanted) as wait:
        for thing in shown:
            yield thing
            wait.done += 1


if __name__ == "__main__":
    with one_line("screen.py", "lower nothing"):
        for i in range(100_000):
            print(f"word {i} of 100,000")
    print("all 100,000 words were said, whoever listened", file=sys.stderr)
