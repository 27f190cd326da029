"""Files and records: files that appear whole, fingerprints of contents, the settings that a result was made with."""

import hashlib
import json
import platform
import shlex
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from common.cli import UserError


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
