"""What becomes of a bad input: it is judged by where the error was raised, and counted by kind.

An error is *clear* if the pack raises it: its sentence was written for a user. An error of a lower layer that reaches
the caller is *raw*. The counts reach the end of the test run through the properties of pytest's reports.
"""

from __future__ import annotations

import io
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from instantcharacter.cli import main as command_line

Outcome = Literal["right", "clear", "raw", "wrong", "hang"]
OUTCOMES: tuple[Outcome, ...] = ("right", "clear", "raw", "wrong", "hang")
PACKAGE = Path(__file__).parents[2] / "instantcharacter"
LIMIT = 10.0
"""Seconds after which an input hangs; where the system has no interval timer, pytest's own limits hold."""


class Hang(BaseException):
    """Raised in code that runs for longer than :data:`LIMIT`; no handler of ``Exception`` catches it."""


class Refused(Exception):
    """A command line printed one line of error, about its words or about a file as the system has it."""


def run_command(arguments: Sequence[str]) -> str:
    """What a command line prints, run in this process as ``python -m instantcharacter`` runs it.

    Raises:
        Refused: it ended with the status of an error and one line that says why.
        Exception: the error behind that line, which may be raw, if it is neither argparse's nor the system's.
        AssertionError: any other end.
    """
    errors: list[Exception] = []
    in_one_line = command_line.one_line

    def one_line(error: Exception) -> str:
        errors.append(error)
        return in_one_line(error)

    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", mode, write_through=True) for mode in ("strict", "backslashreplace")
    )
    with mock.patch.object(command_line, "one_line", one_line), redirect_stdout(out), redirect_stderr(err):
        try:
            status: Any = command_line.main(arguments)
        except SystemExit as stop:
            status = stop.code
    printed, on_stderr = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    if status == 0:
        return printed
    lines = [line for line in on_stderr.splitlines() if "error: " in line]
    assert status in (1, 2), f"status {status}: {on_stderr}"
    assert len(lines) == 1, f"{len(lines)} lines of error: {on_stderr}"
    assert not errors or on_stderr.splitlines()[-1] == lines[0], f"more lines than one: {on_stderr}"
    assert "Traceback" not in on_stderr, on_stderr
    if errors and not is_raised_by_the_pack(errors[0]) and getattr(errors[0], "filename", None) is None:
        raise errors[0]
    raise Refused(lines[0])


class Outcomes:
    """The outcomes of one kind of input.

    Attributes:
        counts: how often each outcome came.
        accepted_raw: parts of the messages of raw errors that are known and listed in ``SECURITY.md``.
    """

    def __init__(self, accepted_raw: tuple[str, ...] = ()) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.accepted_raw = accepted_raw

    def judge(self, call: Callable[[], Any], is_right: Callable[[Any], bool] = lambda result: True) -> Outcome:
        """Count what a call does, and fail unless that is a right result, a clear error, or a known raw one.

        Args:
            call: hands the input to the pack.
            is_right: whether the result of a call without an error is what the input asks for.
        """
        return self.count(*outcome_of(call, is_right))

    def count(self, outcome: Outcome, detail: str) -> Outcome:
        """Count an outcome that was found elsewhere, and fail as :meth:`judge` does."""
        self.counts[outcome] += 1
        known = outcome == "raw" and any(part in detail for part in self.accepted_raw)
        assert outcome in ("right", "clear") or known, f"{outcome}: {detail}"
        return outcome


def outcome_of(call: Callable[[], Any], is_right: Callable[[Any], bool]) -> tuple[Outcome, str]:
    """The outcome of a call, and its result or the traceback of its error."""
    try:
        with _time_limit(LIMIT):
            result = call()
    except Hang:
        return "hang", traceback.format_exc()
    except (Exception, SystemExit) as error:
        return ("clear" if is_clear(error) else "raw"), "".join(traceback.format_exception(error))
    return ("right" if is_right(result) else "wrong"), repr(result)[:500]


def is_clear(error: BaseException) -> bool:
    """Whether the pack raised an error itself, with a message that can be printed."""
    message = str(error)
    can_be_logged = not any("\ud800" <= letter <= "\udfff" for letter in message)
    return isinstance(error, Refused) or (is_raised_by_the_pack(error) and bool(message.strip()) and can_be_logged)


def is_raised_by_the_pack(error: BaseException) -> bool:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise Hang

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
