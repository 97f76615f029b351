"""screen.py -- what a program says: one line when it fails; in a log file ten lines of progress, and no bar.

  $ python -m machinery.screen | head -1     # its reader goes away; the work goes on
"""
import argparse
import contextlib
import math
import os
import sys


class Parser(argparse.ArgumentParser):
    """Flags with their defaults in --help, under the first line of the program's docstring; one that is wrong
    ends the program in one line.
    """

    def __init__(self, doc: str, prog: str | None = None):
        super().__init__(prog=prog, description=doc.splitlines()[0],
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> None:
        fail(self.prog, 2, message)


class _Unread:
    """A stream that goes on when its reader has gone, as in `train.py | head`."""

    def __init__(self, stream):
        self.stream = stream

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
        except BrokenPipeError:                                      # once: from now on all words go there
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

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
    code 2, too little memory with 1 (and `memory`, what to lower), Ctrl-C with 130. Our own errors keep their
    traceback.
    """
    before = sys.stdout
    sys.stdout = _Unread(before)
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError) as e:
        fail(program, 2, str(e))
    except KeyboardInterrupt:
        fail(program, 130, "interrupted; what was written before is whole, nothing else was written")
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        first = (str(e) or "no more to be had").splitlines()[0][:150]
        fail(program, 1, f"out of memory ({first}); {memory}")
    finally:
        sys.stdout = before


def fail(program: str, code: int, message: str) -> None:
    sys.stdout.flush()
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def hide_bar(wanted: bool = True) -> bool | None:
    """tqdm's `disable`. True: no bar, as we or TQDM_DISABLE want it; None: a bar unless stderr is a file."""
    asked = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return True if asked or not wanted else None


def tell_a_log(step: int, steps: int, figures: str) -> None:
    """Where a log file hides the bar: a line of plain text after every tenth of the steps."""
    if hide_bar() is None and not sys.stderr.isatty() and step % math.ceil(steps / 10) == 0:
        print(f"step {step} of {steps}, {figures}", file=sys.stderr)


if __name__ == "__main__":
    with one_line("screen.py", "lower nothing"):
        for i in range(100_000):
            print(f"word {i} of 100,000")
    print("all 100,000 words were said, whoever listened", file=sys.stderr)
