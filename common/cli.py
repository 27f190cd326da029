"""What every script does at its edges: arguments, errors, processes, seeds, and files that appear whole."""

import argparse
import errno
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can mend. The message names the file or option and says what to do."""


def run(main, parse_args):
    """Calls `main(parse_args())`. One message instead of a traceback, and exit code 2, for a `UserError` and for a
    path that cannot be written to; exit code 1 for a full disk or quota, or a file larger than may be."""
    args = None
    try:
        args = parse_args()
        main(args)
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        sys.exit(fail(f"{error.filename}: {error.strerror}. Give another folder, or make it one.", 2))
    except (OSError, SafetensorError) as error:  # safetensors' own kind names the operating system's in its text
        full = [code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                if code == getattr(error, "errno", None) or f"(os error {code})" in str(error)]  # fmt: skip
        if not full:
            raise
        name = getattr(error, "filename", None) or getattr(args, "output_dir", "the output")
        sys.exit(fail(f"{name}: {os.strerror(full[0])}. Free some space and start again: what is finished is kept.", 1))


def fail(message, code):
    print(f"error: {message}", file=sys.stderr)
    return code


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


def parse_with_model_defaults(parser, script, argv=None, presets=None):
    """Parses the command line, with a model's own defaults between those of the script and what the user says.

    Best settings differ from model to model. A local model folder may hold `tint.json`, {script: {option: value}};
    its values replace the script's defaults, which are those of Stable Diffusion. A preset, {option: value} by the
    name of --preset, replaces both.
    """
    argv = sys.argv[1:] if argv is None else argv
    model = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    defaults = Path(model.pretrained_model_name_or_path) / "tint.json"
    if defaults.is_file():
        parser.set_defaults(**read_json(defaults).get(script, {}))
    if presets:
        parser.set_defaults(**presets.get(model.preset, {}))
    return parser.parse_args(argv)


def natural_int(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


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


def start(args):
    """The Accelerator of a script, with its trackers started.

    Without a GPU, Accelerate must be told to use the CPU, or several processes would each do all the work. And
    `accelerate launch` then exports OMP_NUM_THREADS=1 where nobody has set it, which would leave one process all cores
    but one idle: the cores of this machine are shared out among its processes instead.
    """
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_dir=args.output_dir,
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision or --report_to cannot be had here: {error}") from error
    if args.report_to and not accelerator.log_with:
        raise UserError(f"--report_to {args.report_to}: that tracker is not installed (pip install {args.report_to}).")
    launched_with_default = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and launched_with_default:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))
    torch.manual_seed(args.seed)
    if args.report_to:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("tint", config=plain)
    return accelerator


def peak_memory(device):
    """The most memory, in bytes, that this process has held: on the accelerator, or of the machine's on the CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def generator(*keys):
    """A CPU random generator that depends on nothing but its keys, as (seed, class name, image index).

    Drawing on the CPU gives the same numbers whatever the device, the batch size and the number of processes.
    """
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def whole_file(path):
    """Gives a temporary path beside `path`, which becomes `path` at the end: the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_json_lines(path, rows):
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(path):
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and start again.") from error


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, or {Path(path).parent}, to make it anew.") from error


def fingerprint(paths):
    """What stands for the contents of files in a record: a hash of their names and bytes, in order."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(f"{path.name}/{path.stat().st_size}/".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def digest(*values):
    """A short hash of values that JSON can hold (others by their text)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def settings_of(args, *leave_out):
    """The options that decide a result, for its record: those of where and how it is computed are left out."""
    outside = {"output_dir", "mixed_precision", "report_to", *leave_out}
    return {name: value for name, value in vars(args).items() if name not in outside}


def provenance(args, options):
    """What repeats a result: {"settings", "versions", "command"}, the settings being those of `options`."""
    packages = ("torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "onnxruntime")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else platform.machine()
    return {
        "settings": {name: value for name, value in settings_of(args).items() if name in options},
        "versions": versions | {"device": str(device)},
        "command": shlex.join(["accelerate", "launch", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def check_settings(path, settings):
    """True where `path` records a finished result of these settings, False where there is none.

    Raises:
        UserError: the result was made with other settings.
    """
    path = Path(path)
    if not path.is_file():
        return False
    compare_settings(path, read_json(path).get("settings", {}), settings)
    return True


def compare_settings(path, before, settings):
    """Raises a UserError where work that `path` records was begun with other settings."""
    now = json.loads(json.dumps(settings))
    changed = [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in now | before if before.get(k) != now.get(k)]
    if changed:
        raise UserError(
            f"{path} was made with other settings or images ({'; '.join(changed)}). Give another --output_dir, or "
            f"delete {Path(path).parent} to make it anew."
        )
