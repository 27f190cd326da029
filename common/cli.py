"""The command line of every script: its common options, the numbers that options take, and errors in one message."""

import argparse
import errno
import importlib
import os
import shlex
import sys
from contextlib import contextmanager, suppress
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
    errno.ENOENT,  # a file that somebody takes away meanwhile
)  # fmt: skip
LARGE = 1 << 40  # what numbers on the command line stay below: seeds and sizes are made of them, of 63 bits


class UserError(Exception):
    """A mistake that the user can mend. The message names the file or option and says what to do."""


def run(main, parse_args):
    """Calls `main(parse_args())`. One message instead of a traceback, and exit code 2, for a `UserError` and for a
    path that cannot be written to; exit code 1 for a full disk or quota, a file larger than may be, or too little
    memory, 130 for Ctrl-C, and 141 where nobody reads what is printed."""
    args = None
    with suppress(AttributeError):  # of a stream that a test has put there
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        args = parse_args()
        main(args)
        sys.stdout.flush()
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except BrokenPipeError:  # as of `| head`, which reads no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the very end
        sys.exit(141)
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


@contextmanager
def refusing(message, kinds=Exception):
    """Turns whatever fails inside into a UserError, whose message names the reason at {error}: libraries raise errors
    of all `kinds` on what they cannot read. A full disk is no mistake of the user's, and stays what it is."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in FULL:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(message.replace("{error}", reason)) from error


def words_of(options):
    """The words of options in one text, as a shell would give them to a script."""
    with refusing(f"{options!r} cannot be read as options ({{error}})."):
        return shlex.split(options)


def optional(module, user):
    """A module of an optional package, or a UserError that says what needs it."""
    package = module.partition(".")[0]
    with refusing(f"{user} needs the package {package} (pip install {package}): {{error}}"):
        return importlib.import_module(module)


def require_folder(folder, content):
    """The path of a folder of inputs. Where there is none, a UserError says `content`, a sentence about what it should
    hold, and of a default the command that makes it."""
    folder = Path(folder)
    if not folder.is_dir():
        command = MAKES.get(folder.as_posix())
        made = f" `{command}` makes it, here where you start the scripts." if command else ""
        raise UserError(f"{folder}: no such folder. {content}{made}")
    return folder


def refuse_others(*paths):
    """Raises a UserError where one of these files or folders is there: it is somebody's, and would be written over."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path} is there, and of something else: give another --output_dir.")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the script's docstring as it is written."""


def argument_parser(description, output_dir):
    """A parser with the options that all scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--output_dir", default=output_dir, help="folder to write to")
    add("--seed", type=natural_int, default=0, help="seed of everything random")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="overrides what accelerate was launched with")
    add("--deterministic", action="store_true", help="only algorithms that repeat their results, on GPUs too: slower")
    add("--report_to", help="tracker for settings and curves: tensorboard, wandb, trackio, ... (must be installed)")
    return parser


def bounded(kind, low, high, words):
    """The type of an option: an int or a float from `low` to `high`; `words` say so where it is not."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not {words}")
        return value

    convert.__name__ = kind.__name__  # argparse calls the type so
    return convert


TINY, HUGE = sys.float_info.min, sys.float_info.max
natural_int = bounded(int, 0, LARGE, f"between 0 and {LARGE}")
positive_int = bounded(int, 1, LARGE, f"between 1 and {LARGE}")
non_negative = bounded(float, 0, HUGE, "a finite number of at least 0")
positive = bounded(float, TINY, HUGE, "a finite number above 0")
share = bounded(float, 0, 1, "between 0 and 1")
below_one = bounded(float, 0, 1 - sys.float_info.epsilon / 2, "at least 0 and below 1")
positive_share = bounded(float, TINY, 1, "above 0 and at most 1")


def named_paths(specs):
    """{name: path} of a list of [NAME=]PATH; without a name the path is the name."""
    paths = {}
    for spec in specs:
        name, separator, path = spec.partition("=")
        named = separator and "/" not in name and not Path(spec).exists()
        paths[name if named else spec] = path if named else spec
    if len(paths) < len(specs):
        raise UserError(f"{' '.join(specs)}: two have the same name; say NAME=PATH.")
    return paths
