"""The command line of every script: its common options, the numbers that options take, and errors in one message."""

import argparse
import errno
import math
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

MAKES = {  # what the scripts read by default, and the command that writes it
    "outputs/demo/support": "python -m common.datasets",
    "outputs/demo/query": "python -m common.datasets",
    "outputs/demo/inversion": "python tint_invert.py",
    "outputs/demo/generated": "python tint_generate.py",
    "outputs/demo/student": "python distill.py",
}

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
PATHS = (  # what is wrong with a path that cannot be read or written
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
LARGE = 1 << 40  # what numbers on the command line stay below: seeds and sizes are made of them, of 63 bits


class UserError(Exception):
    """A mistake that the user can mend. The message names the file or option and says what to do."""


def run(main, parse_args):
    """Calls `main(parse_args())`. One message instead of a traceback, and exit code 2, for a `UserError` and for a
    path that cannot be written to; exit code 1 for a full disk or quota, a file larger than may be, or too little
    memory, and 130 for Ctrl-C."""
    args = None
    with suppress(AttributeError):  # of a stream that a test has put there
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        args = parse_args()
        main(args)
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except OSError as error:
        name = error.filename or getattr(args, "output_dir", "the output")
        if error.errno in PATHS:
            sys.exit(fail(f"{name}: {error.strerror}. Give another folder, or make it one.", 2))
        if error.errno not in FULL:
            raise
        sys.exit(fail(f"{name}: {error.strerror}. Free some space and start again: what is finished is kept.", 1))
    except (MemoryError, RuntimeError) as error:
        torchs = any(text in str(error) for text in ("out of memory", "allocate memory", "enough memory"))
        if not torchs and not isinstance(error, MemoryError):
            raise
        reason = str(error).partition("\n")[0]
        sys.exit(fail(f"memory does not suffice ({reason}): give smaller batches or images.", 1))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted. What is finished is kept.", 130))


def fail(message, code):
    print(f"error: {message}", file=sys.stderr)
    return code


@cache
def note(message):
    """Says something that the user should know on stderr: once, and in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def require_folder(folder, content):
    """The path of a folder of inputs.

    Args:
        content: a sentence that says what it should hold.
    Raises:
        UserError: there is none. Where it is a default, the message names the command that makes it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        command = MAKES.get(folder.as_posix())
        made = f" `{command}` makes it, here where you start the scripts." if command else ""
        raise UserError(f"{folder}: no such folder. {content}{made}")
    return folder


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the script's docstring as it is written."""


def argument_parser(description, output_dir):
    """A parser with the options that all scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", default=output_dir, help="folder to write to")
    add("--seed", type=natural_int, default=0, help="seed of everything random")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="overrides what accelerate was launched with")
    add("--report_to", help="tracker for settings and curves: tensorboard, wandb, trackio, ... (must be installed)")
    return parser


def natural_int(text):
    value = int(text)
    if not 0 <= value < LARGE:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and {LARGE}")
    return value


def positive_int(text):
    if natural_int(text) == 0:
        raise argparse.ArgumentTypeError("0 is not at least 1")
    return int(text)


def non_negative(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not at least 0")
    return value


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def positive_share(text):
    share(text)
    return positive(text)


def named_paths(specs):
    """{name: path} of a list of [NAME=]PATH; without a name the path is the name."""
    paths = {}
    for spec in specs:
        name, separator, path = spec.partition("=")
        named = separator and "/" not in name
        paths[name if named else spec] = path if named else spec
    if len(paths) < len(specs):
        raise UserError(f"{' '.join(specs)}: two have the same name; say NAME=PATH.")
    return paths
