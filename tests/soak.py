"""Kills the scripts at random moments, starts two in one folder, fills their disk, lets one of two processes die.

    python -m tests.soak --count 20

Whatever happens, nothing hangs, a start without a disturbance then ends well, and the files are those of an undisturbed
run, to the byte. Prints a line a script and disturbance, and ends with exit code 1 where something is not so.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests import ROOT, launcher
from tests.conftest import make_run

HANGS = 600  # seconds; undisturbed, each takes a few
SCRIPTS = {
    "draw": "-m common.datasets --split val --num_ways 2 --num_shots 2 --output_dir out",
    "invert": "tint_invert.py --support_dir {}/support --output_dir out --max_train_steps 12 --validation_steps 2"
              " --validation_samples 4 --patience 0 --num_inference_steps 4 --null_text_batch_size 1",
    "generate": "tint_generate.py --inversion_dir {}/inversion --output_dir out --num_images_per_class 12"
                " --batch_size 4",
    "shards": "tint_generate.py --inversion_dir {}/inversion --output_dir out --num_images_per_class 6"
              " --format webdataset --shard_size 4",
    "distill": "distill.py --support_dir {}/support --supports_only --output_dir out --max_train_steps 12"
               " --checkpointing_steps 2 --train_batch_size 4",
    "evaluate": "evaluate.py --model {}/student --data_dir {}/query --output_dir out",
    "episodes": "evaluate.py --dataset icons_fs --split val --num_ways 2 --num_shots 1 --num_queries 2 --num_episodes 2"
                " --methods prototypes tint --output_dir out --distill=--max_train_steps=2 --generate="
                "--num_images_per_class=2 --invert='--max_train_steps=2 --num_inference_steps=2'",
    "export": "export.py --model {}/student --output_dir out --data_dir {}/generated --precision fp32 fp16 int8",
}  # fmt: skip
TIMED = {"seconds.json", "results.json", "report.html", "benchmark.json", "benchmark.md"}  # hold times or dates


class Launch:
    """A script started in its own folder, by one process, or by several that find each other as torchrun's do."""

    def __init__(self, name, base, folder, processes=1, largest_file=None):
        command = shlex.split(SCRIPTS[name].replace("{}", str(base)))
        if command[0] != "-m":
            command[0] = str(ROOT / command[0])
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (folder / "assets").symlink_to(ROOT / "assets")
        port = launcher.free_port()
        self.logs, self.processes = [], []
        for rank in range(processes):
            environment = {}
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                environment = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            logs = [folder.with_name(f"{folder.name}.{os.getpid()}-{port}-{rank}.{kind}") for kind in ("out", "err")]
            self.logs.append(logs[1])
            environment = {key: str(value) for key, value in environment.items()}
            self.processes.append(launcher.start(command, folder, *logs, environment, largest_file))

    def wait(self, seconds):
        """Whether all processes end in that time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        return not any(process.is_alive() for process in self.processes)

    def kill(self, *ranks):
        for rank in ranks or range(len(self.processes)):
            with suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join()

    def ends(self, codes=(0,)):
        """Waits for the end; raises a RuntimeError with what was printed where it hangs or ends otherwise."""
        in_time = self.wait(HANGS)
        found = [process.exitcode for process in self.processes]
        if not in_time or not set(found) <= set(codes):
            self.kill()
            said = "\n".join(log.read_text()[-1500:] for log in self.logs)
            raise RuntimeError(f"{'ends' if in_time else 'hangs'} with {found}\n{said}")


def content(path, folder):
    """What a file of a folder holds, but for the name of where that lies, and the seconds in an arm's result."""
    data = path.read_bytes().replace(bytes(folder.resolve().parent), b"")
    return json.loads(data)["correct"] if path.name.startswith("result-") else data


def compare(folder, expected):
    """Raises a RuntimeError unless two folders hold the same files."""
    ours, theirs = ({p.relative_to(x) for p in x.rglob("*") if p.is_file()} for x in (folder, expected))
    if ours != theirs:
        raise RuntimeError(f"other files: {sorted(map(str, ours ^ theirs))}")
    for path in sorted(ours):
        if path.name not in TIMED and content(folder / path, folder) != content(expected / path, expected):
            raise RuntimeError(f"{path} is another")


def kills(name, base, folder, expected, seconds, processes, count, rng):
    """`count` kills of all processes at once, each at a random moment of what is left; started again each time."""
    done = 0
    while done < count:
        shutil.rmtree(folder / "out", ignore_errors=True)
        while done < count:
            launch = Launch(name, base, folder, processes)
            if launch.wait(rng.uniform(0, seconds)):
                launch.ends()
                break
            launch.kill()
            done += 1
        Launch(name, base, folder, processes).ends()
        compare(folder / "out", expected)


def neighbours(name, base, folder, expected, seconds, processes, count, rng):
    """`count` starts of two launches in one folder, the second a random while after the first."""
    for _ in range(count):
        shutil.rmtree(folder / "out", ignore_errors=True)
        first = Launch(name, base, folder, processes)
        time.sleep(rng.choice([0, rng.uniform(0, seconds)]))
        second = Launch(name, base, folder, processes)
        first.ends(), second.ends()
        compare(folder / "out", expected)


def full_disk(name, base, folder, expected, seconds, processes, count, rng):
    """`count` runs in which no file, but for messages, may grow beyond a random size; then there is room enough."""
    sizes = [path.stat().st_size for path in expected.rglob("*") if path.is_file()]
    for _ in range(count):
        shutil.rmtree(folder / "out", ignore_errors=True)
        launch = Launch(name, base, folder, 1, largest_file=max(4096, int(rng.choice(sizes) * rng.uniform(0, 1))))
        launch.ends(codes=(0, 1))
        said = launch.logs[0].read_text()
        if "Traceback" in said or ("Free some space" in said) != (launch.processes[0].exitcode == 1):
            raise RuntimeError(f"a full disk: {said[-1500:]}")
        Launch(name, base, folder, 1).ends()
        compare(folder / "out", expected)


def death(name, base, folder, expected, seconds, processes, count, rng):
    """`count` runs of which one of two processes is killed at a random moment: the other ends, too."""
    for _ in range(count):
        shutil.rmtree(folder / "out", ignore_errors=True)
        launch = Launch(name, base, folder, 2)
        if not launch.wait(rng.uniform(0, seconds)):
            launch.kill(rng.randrange(2))
        launch.ends(codes=(0, 1, 2, -signal.SIGKILL, -signal.SIGABRT))
        Launch(name, base, folder, 2).ends()
        compare(folder / "out", expected)


DISTURBANCES = {"kills": kills, "neighbours": neighbours, "full_disk": full_disk, "death": death}


def soak(name, disturbances, base, folder, processes, count, seed):
    """Disturbs one script. Returns {disturbance: what went wrong, or None}."""
    undisturbed = folder / f"{name}-{processes}"
    launcher.warm_up()  # which would count, and nearly all kills come too late
    before = time.monotonic()
    Launch(name, base, undisturbed, processes).ends()
    seconds, results = time.monotonic() - before, {}
    for disturbance in disturbances:
        rng = random.Random(f"{seed}/{name}/{disturbance}/{processes}")
        place = folder / f"{name}-{disturbance}-{processes}"
        results[disturbance] = None
        try:
            DISTURBANCES[disturbance](name, base, place, undisturbed / "out", seconds, processes, count, rng)
        except RuntimeError as error:
            results[disturbance] = str(error)
    return results


def main(args):
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(args.base or Path(folder) / "base").resolve()
        if not base.is_dir():
            make_run(base)
        for processes in args.num_processes:
            chosen = [d for d in args.disturbances if (d, processes) not in (("full_disk", 2), ("death", 1))]
            for name in args.scripts:
                for disturbance, wrong in soak(
                    name, chosen, base, Path(folder), processes, args.count, args.seed
                ).items():
                    print(
                        f"{name}, {processes} processes, {args.count} {disturbance}: {wrong or 'as undisturbed'}",
                        flush=True,
                    )
                    failures += wrong is not None
    return 1 if failures else 0


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--count", type=int, default=20, help="of each disturbance of each script")
    add("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="to disturb")
    add("--disturbances", nargs="+", choices=DISTURBANCES, default=list(DISTURBANCES), help="of these kinds")
    add("--num_processes", type=int, nargs="+", default=[1, 2], help="of a launch")
    add("--seed", type=int, default=0, help="of the random moments")
    add("--base", help="folder of what the scripts read, made where it is not there; default: a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
