"""Files and records: files that appear whole, fingerprints of contents, the settings that a result was made with."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import psutil
import torch
from safetensors.torch import save

from common.cli import UserError, refuse_others, refusing

FINGERPRINT = re.compile("[0-9a-f]{16}")
INPUTS = ("model", "teacher", "student", "dataset", "pretrained_model_name_or_path")  # options that may name a folder
TEMPORARY = re.compile(r"\..+\.(\w+)-(\d+)\.part")  # of the machine and the process that write it


@contextmanager
def whole_file(path, make=Path.touch):
    """Gives a temporary path beside `path`, which becomes `path` at the end: the file appears whole or not at all.

    Any number of processes may write the same file, or remove its folder by `remove_folder`, at the same time.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        for turns_left in reversed(range(10)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                make(temporary)
                break
            except (FileNotFoundError, FileExistsError):  # the folder is being removed: it cannot be, with a file in it
                if not turns_left:
                    raise
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if make is Path.mkdir and path.is_dir():
            return
        if str(error.filename) in (str(temporary), "None"):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        discard(temporary)


def whole_folder(path):
    """The same for a folder. Where another process has made it in the meantime, that one stays."""
    return whole_file(path, Path.mkdir)


def discard(path):
    """Removes a file or a folder, unless another process is quicker, or it may not be."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def temporary_name(path):
    """A hidden name beside `path` that no other process of any machine uses."""
    sweep(path.parent)
    return path.with_name(f".{path.name}.{this_machine()}-{os.getpid()}.part")


@cache
def this_machine():
    """A name of this machine, or container: of all processes that see each other's numbers."""
    numbers = Path("/proc/self/ns/pid")
    return digest(platform.node(), str(numbers.readlink()) if numbers.is_symlink() else "")


@cache
def sweep(folder):
    """Removes what killed processes have left in a folder of files that they were writing; once a process and folder.

    Whether a process of another machine still runs cannot be known: what it has not touched for an hour is taken away.
    """
    for path in Path(folder).glob(".*.part"):
        if not (owner := TEMPORARY.fullmatch(path.name)):
            continue
        machine, process = owner.groups()
        with suppress(OSError):  # another process sweeps too
            here = machine == this_machine()
            if not psutil.pid_exists(int(process)) if here else time.time() - path.stat().st_mtime > 3600:
                discard(path)


def remove_folder(folder):
    """Removes a folder, but for what other processes are writing into it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not TEMPORARY.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)
        with suppress(OSError):
            Path(place).rmdir()


def write_file(path, content):
    """Writes bytes to a file, which appears whole or not at all: see `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def save_tensors(path, tensors, facts=None):
    """Writes {name: tensor}, and facts {name: text}, as a safetensors file."""
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    write_file(path, save(tensors, facts))  # safetensors' own way to a file lets nobody else read it


def blaming(path):
    """Lays what fails inside to a file, in a UserError: a damaged one raises errors of every kind, here or later."""
    return refusing(f"{path} is damaged, or of another version or project ({{error}}): move it away.")


def write_json(path, value):
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_json_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_json_lines(path):
    data = Path(path).read_bytes()
    with blaming(path):
        return [json.loads(line) for line in data.splitlines()]


def read_json(path, kind=object):
    """What a JSON file holds; a UserError where it is no JSON, or not of the kind wanted."""
    data = Path(path).read_bytes()
    with blaming(path):
        value = json.loads(data)
        if not isinstance(value, kind):
            raise ValueError(f"it should hold a {kind.__name__}")
        return value


def keep_apart(args):
    """Raises a UserError where the output folder is an input folder, lies in one, or holds one, links being followed:
    what is written would be taken for input. And where its name is no UTF-8, which safetensors would not read."""
    if os.fsencode(args.output_dir) != str(args.output_dir).encode(errors="replace"):
        raise UserError(f"--output_dir {args.output_dir!r}: that name is no UTF-8. Give another.")
    output = Path(os.path.realpath(args.output_dir))  # which, unlike Path.resolve, takes a link to itself
    options = [name for name in vars(args) if name in INPUTS or (name.endswith("_dir") and name != "output_dir")]
    for option in options:
        values = vars(args)[option]
        for value in map(str, filter(None, values if isinstance(values, list) else [values])):
            path = value if Path(value).exists() else value.partition("=")[2] or value  # [NAME=][prototypes:]PATH
            folder = Path(path if Path(path).exists() else path.removeprefix("prototypes:"))
            source = Path(os.path.realpath(folder))
            relations = {"is": output == source, "lies in": source in output.parents, "holds": output in source.parents}
            relation = next((name for name, is_so in relations.items() if is_so), None)
            beside = relation == "holds" and option in ("dataset", "dataset_dir", "web_dir")  # evaluate.py's results
            if relation and not beside and folder.is_dir():
                raise UserError(f"--output_dir {args.output_dir} {relation} --{option} {value}: keep them apart.")


def refuse_other_results(record, kind):
    """The same of a `record`, as results.json, and report.html beside it, unless it is of this "kind"."""
    if not record.is_file() or read_json(record, dict).get("kind") != kind:
        refuse_others(record, record.with_name("report.html"))


def fingerprint(paths):
    """What stands for the contents of files in a record: a hash of their names and bytes, in order."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(f"{path.name}/{path.stat().st_size}/".encode(errors="surrogateescape"))
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprints(paths, root):
    """{path below root: fingerprint} of files, of which `differences` can say in words what has changed."""
    return {Path(path).relative_to(root).as_posix(): fingerprint([path]) for path in paths}


def fingerprint_tensors(tensors):
    """The same for the contents of tensors [(name, tensor), ...] on the CPU."""
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        hashed.update(name.encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(*values):
    """A short hash of values that JSON can hold (others by their text)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def settings_of(args, *leave_out):
    """The options that decide a result, for its record: those of where and how it is computed are left out."""
    outside = {"output_dir", "mixed_precision", "report_to", "deterministic", *leave_out}
    return {name: value for name, value in vars(args).items() if name not in outside}


def provenance(args, options):
    """What repeats a result: {"settings", "versions", "command"}, the settings being those of `options`."""
    packages = ("torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "onnxruntime")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else platform.machine()
    launcher, processes = ["python"], os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        launcher = ["accelerate", "launch", "--num_processes", processes]
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:
        launcher = ["accelerate", "launch"]
    return {
        "settings": {name: value for name, value in settings_of(args).items() if name in options},
        "versions": versions | {"device": str(device)},
        "command": shlex.join([*launcher, *sys.argv]),
    }


def check_settings(path, settings, may_grow=()):
    """Whether `path` records a finished result, which must be of these settings: see `compare_settings`."""
    if not Path(path).is_file():
        return False
    with blaming(path):
        compare_settings(path, dict(read_json(path)["settings"]), settings, may_grow)
    return True


def compare_settings(path, before, settings, may_grow=()):
    """Raises a UserError where work that `path` records was begun with other settings. To those named by `may_grow`,
    {file: fingerprint}, files may have been added."""
    now = json.loads(json.dumps(settings))
    for name in may_grow:
        if isinstance(before.get(name), dict):
            now[name] = {file: value for file, value in now[name].items() if file in before[name]}
    if changed := "; ".join(differences(before, now)):
        raise UserError(f"{path} was made with other settings or images ({changed}). Give another --output_dir, or "
                        f"move {Path(path).parent} out of the way, to make it anew.")  # fmt: skip


def differences(before, now):
    """What has changed from one record of settings to another, in words."""
    for name in dict.fromkeys([*now, *before]):
        then, since = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(since, dict):
            yield from (f"{name}: {text}" for text in changed_files(then, since))
        elif then != since and any(isinstance(x, str) and FINGERPRINT.fullmatch(x) for x in (then, since)):
            yield f"{name} changed"
        elif then != since:
            yield f"{name}: {then} then, {since} now"


def changed_files(before, now, most=5):
    """The differences of two {class/file: fingerprint} in words, as "1 photo added to hammer: x.png"."""
    verbs = {
        "added to": now.keys() - before.keys(),
        "removed from": before.keys() - now.keys(),
        "changed in": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    for verb, names in verbs.items():
        for group, members in groupby(sorted(name.rpartition("/") for name in names), itemgetter(0)):
            files = [file for _, _, file in members]
            what = f"{len(files)} photo{'s' if len(files) > 1 else ''} {verb} {group}" if group else verb.split()[0]
            yield f"{what}: {', '.join(files[:most])}{', ...' if len(files) > most else ''}"
