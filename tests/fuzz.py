"""Tries the scripts with bad input: damaged files, foreign folders, options out of range.

    python -m tests.fuzz --count 600 --seed 0

Whatever the input, a script does its work or says in one message what is wrong; it never ends in a traceback, never
hangs, and writes nothing outside its output folder. Prints what did otherwise, with the command and the reason, and
ends with exit code 1 where anything did.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import onnx

from tests import ROOT, launcher
from tests.conftest import killed_when, launch, make_run

HANGS = 300  # seconds; any of these commands takes a few, of one core
COMMANDS = {  # options as short as they can be; {} is the sandbox
    "invert": "tint_invert.py --support_dir {}/support --output_dir {}/out --max_train_steps 1 --validation_samples 1"
              " --num_inference_steps 2 --null_text_steps 1",
    "go_on_inverting": "tint_invert.py --support_dir {}/support --output_dir {}/half_inverted --max_train_steps 30"
                       " --validation_steps 1 --patience 0 --num_inference_steps 2",
    "generate": "tint_generate.py --inversion_dir {}/inversion --output_dir {}/out --num_images_per_class 1",
    "filter": "tint_generate.py --inversion_dir {}/inversion --output_dir {}/out --num_images_per_class 1"
              " --filter_threshold 0.5 --method img2img",
    "go_on_generating": "tint_generate.py --inversion_dir {}/inversion --output_dir {}/generated"
                        " --num_images_per_class 6 --alpha 0 0.5 1",
    "distill": "distill.py --support_dir {}/support --train_dir {}/generated --output_dir {}/out --max_train_steps 1"
               " --train_batch_size 4 --student {}/student",
    "distill_shards": "distill.py --support_dir {}/support --train_dir {}/shards --output_dir {}/out"
                      " --max_train_steps 1 --train_batch_size 4",
    "distill_unlabeled": "distill.py --support_dir {}/support --unlabeled_dir {}/query --output_dir {}/out"
                         " --max_train_steps 1 --train_batch_size 4 --student_checkpoint {}/student/model.safetensors"
                         " --teacher_checkpoint {}/teacher.safetensors",
    "go_on_distilling": "distill.py --support_dir {}/support --supports_only --output_dir {}/half_distilled"
                        " --max_train_steps 40 --checkpointing_steps 1 --train_batch_size 4",
    "evaluate": "evaluate.py --model {}/student --data_dir {}/query --output_dir {}/out",
    "evaluate_onnx": "evaluate.py --model {}/export/student_fp32.onnx --data_dir {}/support --output_dir {}/out",
    "evaluate_prototypes": "evaluate.py --model assets/student --data_dir {}/support --support_dir {}/support"
                           " --output_dir {}/out",
    "evaluate_generated": "evaluate.py --generated_dir {}/generated --support_dir {}/support --output_dir {}/out"
                          " --teacher {}/student",
    "plan": "evaluate.py --plan --pilot {}/episodes/results.json --half_width 0.05 --output_dir {}/out",
    "episodes": "evaluate.py --dataset {}/few_shot --methods prototypes --num_ways 2 --num_shots 1 --num_queries 1"
                " --num_episodes 2 --output_dir {}/episodes",
    "csv": "evaluate.py --dataset miniimagenet --dataset_dir {}/csv --methods prototypes --num_ways 2 --num_shots 1"
           " --num_queries 1 --num_episodes 1 --output_dir {}/out",
    "cifar": "-m common.datasets --dataset cifar_fs --dataset_dir {}/cifar --output_dir {}/out",
    "draw": "-m common.datasets --dataset {}/few_shot --num_ways 2 --num_shots 1 --output_dir {}/out",
    "export": "export.py --model {}/student --output_dir {}/out --data_dir {}/generated --precision fp32 int8",
    "go_on_exporting": "export.py --model {}/student --output_dir {}/export --query_dir {}/query --support_dir"
                       " {}/support --teacher {}/student",
    "demo": "demo.py --output_dir {}/nowhere --invert=--end",  # whatever else it is given, it ends there
}  # fmt: skip
READS = {  # what a command reads, as patterns below the sandbox
    "invert": ["support/*/*"],
    "go_on_inverting": ["half_inverted/.partial*/*", "half_inverted/*/*", "support/*/*"],
    "generate": ["inversion/*/*"],
    "filter": ["inversion/*/*", "support/*/*"],
    "go_on_generating": ["generated/*", "generated/.rows/*"],
    "distill": ["support/*/*", "generated/*/*", "generated/*.jsonl", "student/*"],
    "distill_shards": ["shards/*"],
    "distill_unlabeled": ["query/*/*", "student/model.safetensors", "teacher.safetensors"],
    "go_on_distilling": ["half_distilled/*"],
    "evaluate": ["student/*", "query/*/*"],
    "evaluate_onnx": ["export/student_fp32.onnx"],
    "evaluate_prototypes": ["support/*/*"],
    "evaluate_generated": ["generated/*", "generated/*/*"],
    "plan": ["episodes/results.json"],
    "episodes": ["few_shot/splits.json", "few_shot/*/*", "episodes/*", "episodes/episodes/*/*"],
    "csv": ["csv/*.csv", "csv/images/*"],
    "cifar": ["cifar/*"],
    "draw": ["few_shot/splits.json", "few_shot/*/*"],
    "export": ["student/*", "generated/*/*", "generated/metadata.jsonl"],
    "go_on_exporting": ["export/*", "student/*", "query/*/*"],
    "demo": [],
}  # fmt: skip
VALUES = (
    "-1", "0", "0.5", "-0.5", "1.5", "nan", "inf", "-inf", "1e-30", "1e308", "99999999999999999999", "", " ", "x", "é",
    "../x", "/", ".", "none", "true", "[]", "{}", "{x}", "a b", "--", "\t", "%s", "<a>", "hf-hub:",
    "x" * 300,
)  # fmt: skip
LARGE = 1 << 40  # what a JSON number is replaced by; on the command line it would be honest, if long, work


def make_base(root, run=None):
    """A folder that holds an example of all that scripts read; `run` is a folder of `make_run`, if there is one."""
    if run is None:
        make_run(root)
    else:
        shutil.copytree(run, root)
    launch("tint_generate.py", "--inversion_dir", root / "inversion", "--output_dir", root / "shards",
           "--num_images_per_class", 4, "--format", "webdataset", "--shard_size", 4)  # fmt: skip
    shutil.copyfile(ROOT / "assets" / "teacher" / "model.safetensors", root / "teacher.safetensors")
    names = sorted(path.name for path in (root / "support").iterdir())
    few_shot, table = root / "few_shot", root / "csv"
    shutil.copytree(root / "support", few_shot)
    (few_shot / "splits.json").write_text(json.dumps({"base": names, "val": names, "novel": names}))
    (table / "images").mkdir(parents=True)
    lines = ["filename,label"]
    for path in sorted((root / "support").glob("*/*")):
        lines.append(f"{path.parent.name}-{path.name},{path.parent.name}")
        shutil.copyfile(path, table / "images" / lines[-1].partition(",")[0])
    for part in ("train", "val", "test"):
        (table / f"{part}.csv").write_text("\n".join(lines) + "\n")
    (root / "cifar").mkdir()
    for name in ("train.bin", "test.bin"):
        (root / "cifar" / name).write_bytes(bytes(i % 100 if j < 2 else 7 for i in range(400) for j in range(3074)))
    (root / "cifar" / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)) + "\n")
    launch(*COMMANDS["episodes"].format(*[root] * 9).split())
    for name, sign in (("go_on_inverting", ".partial*/images-0.safetensors"), ("go_on_distilling", "checkpoint*")):
        command = shlex.split(COMMANDS[name].replace("{}", str(root)))
        folder = Path(command[command.index("--output_dir") + 1])
        killed_when(lambda folder=folder, sign=sign: list(folder.glob(sign)), *command)


def damaged_bytes(data, rng):
    kind = rng.choice(["flip", "flip", "cut", "cut", "zero", "add", "empty", "noise", "head"])
    data = bytearray(data)
    if kind in ("flip", "head") and data:
        for _ in range(rng.choice([1, 1, 4, 40])):
            data[rng.randrange(len(data) if kind == "flip" else min(64, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "cut" and data:
        del data[rng.randrange(len(data)) :]
    elif kind == "zero" and data:
        start = rng.randrange(len(data))
        data[start : start + 100] = bytes(len(data[start : start + 100]))
    elif kind == "add":
        data += rng.randbytes(20)
    else:
        data = bytearray(rng.randbytes(200) if kind == "noise" else b"")
    return bytes(data), kind


def damaged_json(value, rng):
    """A JSON value of which one part is gone or another, and where."""
    holders, stack = [], [("", value)]
    while stack:
        where, node = stack.pop()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        holders += [(where, node, key) for key in keys]
        stack += [(f"{where}/{key}", node[key]) for key in keys]
    other = rng.choice([None, -1, 0, 0.5, "", "x", "../../x", [], {}, [1], {"x": 1}, True, LARGE, float("nan")])
    if not holders or rng.random() < 0.1:
        return other, f"all = {other!r}"
    where, node, key = rng.choice(holders)
    if isinstance(node, dict) and rng.random() < 0.3:
        del node[key]
        return value, f"{where}/{key} is gone"
    node[key] = other
    return value, f"{where}/{key} = {other!r}"


def damaged_facts(facts, rng):
    """Damages one of the facts {name: JSON} that a file keeps beside its tensors, and says how."""
    name = rng.choice(sorted(facts))
    try:
        value, how = damaged_json(json.loads(facts[name]), rng)
    except ValueError:  # a plain text
        value, how = damaged_json(facts[name], rng)
    facts[name] = json.dumps(value)
    return f"{name}{how}"


def damaged_header(data, rng):
    """A safetensors file with a header of which one part is gone or another, or one of whose facts is."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if header.get("__metadata__") and rng.random() < 0.7:
        how = damaged_facts(header["__metadata__"], rng)
    else:
        header, how = damaged_json(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:], how


def damaged_onnx(data, rng):
    """An ONNX file with other metadata."""
    model = onnx.load_from_string(data)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    how = damaged_facts(facts, rng)
    onnx.helper.set_model_props(model, facts)
    return model.SerializeToString(), how


STRUCTURED = {".safetensors": damaged_header, ".onnx": damaged_onnx}


def damage(path, rng, base):
    """Damages a file, and says how."""
    kind = rng.random()
    if kind < 0.06:
        path.unlink()
        return "is gone"
    if kind < 0.1:
        path.unlink()
        path.mkdir()
        return "is a folder"
    if kind < 0.15:
        other = rng.choice(sorted(p for p in base.rglob("*") if p.is_file()))
        path.unlink()
        shutil.copyfile(other, path)
        return f"is {other.relative_to(base)}"
    data = path.read_bytes()
    path.unlink()  # it is a link to the original
    if path.suffix in (".json", ".jsonl") and kind < 0.8:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        turn = rng.randrange(len(lines))
        value, how = damaged_json(json.loads(lines[turn]), rng)
        lines[turn] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n")
        return how
    data, how = (STRUCTURED[path.suffix] if path.suffix in STRUCTURED and kind < 0.6 else damaged_bytes)(data, rng)
    path.write_bytes(data)
    return how


def options_of(script):
    """The options in the help of a script."""
    text = launch(*script, "--help")[0]
    return [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]


def make_case(seed, base, sandbox):
    """Fills a sandbox with links to the base's files and spoils something.

    Returns:
        the command, its working directory, and what is wrong.
    """
    rng = random.Random(seed)
    shutil.copytree(base, sandbox, copy_function=lambda a, b: Path(b).hardlink_to(a))
    names = [name for name in COMMANDS if name != "demo"]
    name = rng.choices(names, [1 if "export" in name else 4 for name in names])[0]  # which takes four times as long
    kind = rng.choice(["file", "file", "file", "file", "option", "folder"])
    if kind == "option":
        name = rng.choice(list(COMMANDS))
    command = shlex.split(COMMANDS[name].replace("{}", str(sandbox)))
    if command[0] != "-m":
        command[0] = str(ROOT / command[0])
    if kind == "file":
        files = [p for pattern in READS[name] for p in sorted(sandbox.glob(pattern)) if p.is_file()]
        path = rng.choice(files)
        # Many images are alike, and one record is unlike another: each kind of file gets its share.
        suffix = rng.choice(sorted({p.suffix for p in files}))
        path = rng.choice([p for p in files if p.suffix == suffix])
        return command, ROOT, f"{path.relative_to(sandbox)}: {damage(path, rng, base)}"
    if kind == "folder":
        places = [
            i for i, word in enumerate(command) if word.startswith(str(sandbox)) and "output" not in command[i - 1]
        ]
        place = rng.choice(places)
        found = sorted(p for p in sandbox.rglob("*") if not p.name.startswith("."))
        (sandbox / "empty").mkdir()
        (sandbox / "dangling").symlink_to("nowhere")
        (sandbox / "odd" / "class\n\udcff").mkdir(parents=True)
        others = [*rng.sample(found, 3), sandbox, sandbox / "empty", sandbox / "dangling", sandbox / "odd", "/dev/null"]
        command[place] = str(rng.choice(others))
        return command, rng.choice([ROOT, ROOT, sandbox]), f"{command[place - 1]} is another"
    script = command[:2] if command[0] == "-m" else command[:1]
    option, value = rng.choice(options_of(script)), rng.choice(VALUES)
    (sandbox / "assets").symlink_to(ROOT / "assets")  # so that it may start here, where all that it writes is seen
    return [*command, option, value], sandbox, f"{option} {value!r}"


def snapshot(folder, leave_out):
    """{path: (size, time of change)} of what is below a folder but for its subfolders `leave_out`."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_relative_to(leave_out) and path.is_file():
            facts = path.stat()
            found[path] = facts.st_size, facts.st_mtime_ns
    return found


def try_case(seed, base, folder):
    """What a script did wrong with a bad input, None where nothing, and its exit code."""
    sandbox = Path(folder) / str(seed)
    try:
        command, cwd, what = make_case(seed, base, sandbox)
        place = [i for i, word in enumerate(command) if word == "--output_dir" and i + 1 < len(command)][-1]
        output_dir = Path(cwd, command[place + 1])
        before = snapshot(sandbox, output_dir)
        wrong, code = None, None
        try:
            code, _, err = launcher.run(command, cwd, HANGS)
        except TimeoutError:
            wrong = "hangs"
        else:
            if "Traceback" in err or code not in (0, 1, 2) or (code == 1 and "error: " not in err):
                wrong = f"ends with {code}: {err[-1500:]}"
            elif code == 2 and "error: " not in err:
                wrong = f"says nothing: {err[-500:]}"
        if not wrong and snapshot(sandbox, output_dir) != before:
            wrong = "writes outside its output folder"
        return wrong and f"--- {seed}: {what}\n{shlex.join(command)}\n{wrong}", code
    finally:
        shutil.rmtree(sandbox, ignore_errors=True)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(args.base or Path(folder) / "base")
        if not base.is_dir():
            make_base(base)
        failures, codes = [], []
        for seed in range(args.seed, args.seed + args.count):
            wrong, code = try_case(seed, base, folder)
            codes.append(code)
            if len(codes) % 10 == 0:
                print(f"{len(codes)} tried", file=sys.stderr, flush=True)
            if wrong:
                failures.append(wrong)
                print(wrong, flush=True)
        refused = codes.count(2)
        print(
            f"{args.count} bad inputs: {refused} refused, {codes.count(0)} worked all the same, {len(failures)} wrong"
        )
        return 1 if failures else 0


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="bad inputs to try")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--base", help="folder of good examples, made where it is not there; default: a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
