"""Entry point of the command line: reads the options, runs the command, turns errors into one line."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from io import TextIOWrapper

from .errors import one_line
from .options import (
    BatchOptions,
    ConvertOptions,
    DemoOptions,
    DownloadOptions,
    EncodeOptions,
    GenerateOptions,
    Options,
    TrainOptions,
)
from .parser import build_parser, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; those of the process if not given. Without any, help is printed.

    Returns:
        The exit status: 0, 1 if some of many pictures are missing, 2 for an error, 130 when cancelled.

    Raises:
        SystemExit: after ``--help``, and with status 2 for an option that does not exist or has an impossible value.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        build_parser().print_help()
        return 0
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    options = parse(arguments)
    if not options.verbose:
        _silence_libraries()
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _run(options: Options) -> int:
    """Run the command of these options; returns the exit status.

    Each is imported here, so that ``--help`` loads neither torch nor diffusers.
    """
    match options:
        case GenerateOptions():
            from .generate import generate

            generate(options)
        case BatchOptions():
            from .batch import batch

            return batch(options)
        case EncodeOptions():
            from .generate import encode

            encode(options)
        case ConvertOptions():
            from .files import convert

            convert(options)
        case DownloadOptions():
            from .files import download

            download(options)
        case TrainOptions():
            from .train import train

            train(options)
        case DemoOptions():
            from .demo import demo

            demo(options)
    return 0


def _silence_libraries() -> None:
    """Hide the libraries' warnings and log messages, which are for developers."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
