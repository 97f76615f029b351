"""screen.py -- what a program prints: one line when it fails, and ten lines of progress in a log file.

  $ python -m machinery.screen | head -1     # its reader goes away, and the work continues
"""
import argparse
import contextlib
import decimal
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
AGAIN = 60.0                 # seconds between that line and the next
# A batch system sends the first three, at or before a time limit; a terminal that closes sends the others.
ENDINGS = ("SIGTERM", "SIGUSR1", "SIGXCPU", "SIGHUP", "SIGBREAK")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the default of each flag, unless the text says it, or there is none to say."""

    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose --help shows the first line of the program's docstring, and each flag with its default.

    A wrong flag ends the program with one line. A ~ that the shell has left in a path is expanded here.
    """

    def __init__(self, doc: str, prog: str | None = None):
        ready()
        super().__init__(prog=prog, description=doc.splitlines()[0],
                         formatter_class=Help)

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
    """Make stdout and stderr accept any text. Parser and one_line call this; a second call does no harm.

    A letter that the encoding lacks becomes a backslash and a number. A stream that was closed (`>&-`) leads
    nowhere. Each line is written at once, so that in a log file the lines of both streams are in order.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:                                          # else the next file would get this number,
            os.open(os.devnull, os.O_RDWR)                       # and C libraries would write into it
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


class _Unread:
    """A stream that goes on when its reader has gone, as in `train.py | head`, or when its disk is full.

    lost: the error of the disk, if there was one, because that text should have been kept
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
        except OSError as e:                                         # once: all further text goes there
            if not isinstance(e, BrokenPipeError):
                self.lost = e
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def out_of_memory(e: BaseException) -> bool:
    """Whether `e` says that memory ran out. CUDA has a class for it, a CPU and Apple's GPU have a sentence.

    The class is recognised by its name, because accountant.py uses this file and needs no torch.
    """
    words = f"{type(e).__name__}: {e}"
    said = any(known in words for known in ("OutOfMemoryError", "out of memory", "can't allocate memory"))
    return isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and said)


@contextlib.contextmanager
def one_line(program: str, memory: str):
    """Bad input, a failing disk, too little memory or a signal end the program with one line on stderr.

    The exit code is 2 for bad input and a failing disk, 1 for too little memory (the line then says what to
    do, `memory`), 130 for Ctrl-C and 143 for SIGTERM. Any other error keeps its traceback.
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
            fail(program, 2, f"its output is lost ({sys.stdout.lost.strerror}), but its work is done")
    except (ValueError, OSError) as e:
        fail(program, 2, str(e))
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        fail(program, 128 + number, f"interrupted{by}; what was written before is whole, and nothing else "
                                    f"was written")
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        first = (str(e) or "no more is available").splitlines()[0][:150]
        fail(program, 1, f"out of memory ({first}); {memory}")
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def signals() -> list[int]:
    """The signals that ask the program to end: Ctrl-C, and those of ENDINGS that exist here.

    Signals that are ignored are left out (nohup ignores SIGHUP). In other threads than the first there are
    none.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
    return [signal.SIGINT] + [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def answer_signals() -> None:
    """From here on, each of these signals raises KeyboardInterrupt at once."""
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


def up(x: float, digits: int) -> str:
    """x rounded up to so many digits, so that a bound stays one: 8.1261 with 3 digits is 8.13, inf is inf."""
    if not math.isfinite(x):
        return str(x)
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal_from_float(x)):.{digits}g}"


def cause(e: BaseException) -> str:
    """Why a file could not be read, in words, because only programmers know the classes of exceptions."""
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
    if isinstance(e, UnicodeDecodeError) or "(char " in words:           # errors of json end so
        return "it is cut off or another kind of text"
    if isinstance(e, MemoryError):
        return "it is too large for the memory"
    if isinstance(e, (TypeError, AttributeError)) or not words:      # what was found is of another form
        return "it holds something else"
    return words[:300]


# -----------------------------------------------------------------------------
# waiting: a bar on a terminal; a few lines in a log file, which would keep every state of a bar


def hide_bar(wanted: bool = True) -> bool | None:
    """The argument `disable` of tqdm. True: no bar, as we or TQDM_DISABLE ask; None: one on a terminal only.

    Of several ranks (torchrun), only the first has bars.
    """
    asked = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return True if asked or not wanted or not first() else None


def first() -> bool:
    """Whether this process is rank 0 or the only one, which prints and writes the files."""
    return os.environ.get("RANK", "0") == "0"


def tell_a_log(step: int, steps: int, figures: str) -> None:
    """Print a line of plain text after every tenth of the steps, if a log file hides the bar."""
    if hide_bar() is None and not sys.stderr.isatty() and step % math.ceil(steps / 10) == 0:
        print(f"step {step} of {steps}, {figures}", file=sys.stderr)


class waiting:
    """Inside the `with`, a line on stderr says what takes so long.

    It is printed after PATIENCE seconds, and then every AGAIN seconds. Nothing is printed where bars are
    hidden, or where a terminal shows a bar (has_bar).

        with screen.waiting("drawing samples.png"): ...
        ->  drawing samples.png takes a while (5 s so far)
    """

    def __init__(self, what: str, total: int | None = None, has_bar: bool = False, wanted: bool = True):
        self.what, self.done, self.total = what, 0, total
        self.silent = hide_bar(wanted) is True or (has_bar and sys.stderr.isatty())
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
    """`things` one by one, under a bar if they take more than a second. In a log file `waiting` prints lines.

    total: how many there are, if they have no len()
    """
    from tqdm import tqdm                                        # only here: accountant.py has no bar
    total = len(things) if total is None else total
    shown = tqdm(things, desc=what, unit=unit, total=total, delay=1, leave=None, disable=hide_bar(wanted))
    with waiting(what, total, has_bar=True, wanted=wanted) as wait:
        for thing in shown:
            yield thing
            wait.done += 1


if __name__ == "__main__":
    with one_line("screen.py", "close other programs"):
        for i in range(100_000):
            print(f"line {i} of 100,000")
    print("all 100,000 lines were printed, whether or not they were read", file=sys.stderr)
