"""`mgen` as a user types it, in a child process that need not import everything anew."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

LETTERS = "ACGT"
ASKED = (signal.SIGINT, signal.SIGTERM)


def table(path: Path, rows: int = 1500) -> Path:
    """Random sequences, one empty, one illegal, some there twice."""
    draw = random.Random(3)
    texts = ["".join(draw.choices(LETTERS, k=draw.randint(5, 60))) for _ in range(rows)]
    texts[7], texts[11], texts[-1] = "", "AC%GT", texts[0]
    path.write_text("\n".join(["id,sequence", *(f"g{n},{t}" for n, t in enumerate(texts))]) + "\n")
    return path


def embed(data: Path, run: Path, *more: object) -> list[str]:
    """The words of a run of some hundred batches."""
    words = ["embed", data, "--backbone", "dna_onehot", "--output", run, "--batch-tokens", 128]
    return [*map(str, words), *map(str, more)]


def merge(run: Path) -> list[str]:
    return ["merge", str(run), "--to", str(merged(run))]


def merged(run: Path) -> Path:
    return run.parent / f"{run.name}.parquet"


class Child:
    """A process that is at work on `mgen WORDS`; what it says goes to a file."""

    def __init__(
        self, words: Sequence[str], said: Path, before: Callable[[], object] = int
    ) -> None:
        self.said = said
        self.began = time.perf_counter()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that comes before the child is itself would be taken for one to this program.
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)

    def _run(self, words: Sequence[str], before: Callable[[], object]) -> None:
        code = 70
        try:
            for number in ASKED:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
            file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            before()
            from mgen_core.cli import main

            sys.argv = ["mgen", *words]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:  # nothing but this: what interrupted it would go on as the program of the tests
            os._exit(code)

    def over(self) -> bool:
        """Whether it has ended; leaves its code for `wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, as a shell tells it: 128 and the signal where one ended it."""
        _, status = os.waitpid(self.pid, 0)
        self.seconds = time.perf_counter() - self.began
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def mgen(words: Sequence[str], said: Path) -> int:
    """Run it to its end; its exit code."""
    return Child(words, said).wait()
