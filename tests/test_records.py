"""Files that appear whole, whoever else writes them, and whatever kills their writers."""

import json
import os
import signal
import stat
from argparse import Namespace
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file

from common import models
from common.cli import UserError
from common.inversion import batches, begin
from common.records import (
    TEMPORARY,
    blaming,
    remove_folder,
    save_tensors,
    sweep,
    temporary_name,
    whole_file,
    whole_folder,
    write_json,
)
from tests.conftest import ROOT, TWO_PROCESSES, launch

FORK = get_context("fork")


def in_processes(function, *arguments):
    """The exit codes of forked processes that call the function, one for each of the arguments, all at once."""
    processes = [FORK.Process(target=function, args=(argument,)) for argument in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_eight_processes_write_the_same_file_and_folder_at_once(tmp_path):
    barrier = FORK.Barrier(8)

    def write(number):
        for turn in range(50):
            barrier.wait(30)
            write_json(tmp_path / "sub" / f"{turn}.json", {"number": number, "padding": "x" * 10_000})
            with whole_folder(tmp_path / f"folder-{turn}") as temporary:
                (temporary / "a").write_text("a")
                (temporary / "b").write_text("b")
            remove_folder(tmp_path / "sub")

    assert in_processes(write, *range(8)) == [0] * 8
    write_json(tmp_path / "sub" / "last.json", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"sub"} | {f"folder-{turn}" for turn in range(50)}
    assert all({p.name for p in tmp_path.glob(f"folder-{turn}/*")} == {"a", "b"} for turn in range(50))


def test_a_file_is_one_writers_from_beginning_to_end(tmp_path):
    def write(number):
        for _ in range(100):
            write_json(tmp_path / "x.json", [number] * 1000)
            assert len(set(json.loads((tmp_path / "x.json").read_text()))) == 1

    assert in_processes(write, *range(4)) == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_writer_leaves_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    barrier = FORK.Barrier(2)

    def die(path):
        with whole_file(path) as temporary, whole_folder(tmp_path / "folder"):
            temporary.write_text("half")
            barrier.wait(30)  # else the second sweeps what the first has left
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_processes(die, tmp_path / "a.json", tmp_path / "b.json") == [-signal.SIGKILL] * 2
    assert len(list(tmp_path.glob(".*.part"))) == 4
    living = temporary_name(tmp_path / "c.json")
    living.touch()
    elsewhere = [tmp_path / f".{name}.json.0123456789-77.part" for name in ("fresh", "old")]
    for path in (*elsewhere, tmp_path / ".mine.part"):
        path.touch()
    os.utime(elsewhere[1], (0, 0))

    sweep.cache_clear()  # once a process
    write_json(tmp_path / "a.json", 1)
    kept = {"a.json", living.name, elsewhere[0].name, ".mine.part"}
    assert {p.name for p in tmp_path.iterdir()} == kept
    remove_folder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {living.name, elsewhere[0].name}
    assert all(TEMPORARY.fullmatch(p.name) for p in tmp_path.iterdir())


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x.json")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and (tmp_path / "x.json").read_text() == "1\n"


def test_files_have_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.arange(6.0).view(2, 3).T}, {"fact": "1"})
        models.save_model(models.load_model("assets/student"), tmp_path / "model", ["a", "b"])
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert load_file(tmp_path / "a.safetensors")["a"].equal(torch.arange(6.0).view(2, 3).T)


def test_what_the_main_process_sees_counts_for_all(tmp_path):
    """A file may change between the looks of two processes, or be damaged for one of them."""
    (tmp_path / "look.py").write_text(
        "from accelerate import Accelerator\n"
        "from common.cli import UserError\n"
        "from common.processes import as_main_sees, share_out\n"
        "def refuse():\n"
        "    raise UserError(f'damaged for {us.process_index}')\n"
        "us = Accelerator(cpu=True)\n"
        "found = open(f'{__file__}.{us.process_index}', 'w')\n"
        "print(as_main_sees(lambda: us.process_index + 5, us), share_out('abc', us), file=found)\n"
        "try:\n"
        "    as_main_sees(refuse if us.is_main_process else int, us)\n"
        "except UserError as error:\n"
        "    print(error, file=found)\n"
        "us.end_training()\n"
    )
    launch(tmp_path / "look.py", by=["env", f"PYTHONPATH={ROOT}", *TWO_PROCESSES])
    assert (tmp_path / "look.py.0").read_text() == "5 ['a', 'c']\ndamaged for 0\n"
    assert (tmp_path / "look.py.1").read_text() == "5 ['b']\ndamaged for 0\n"


def test_an_episode_is_written_once_and_an_interrupted_one_completed(tmp_path):
    command = ("-m", "common.datasets", "--split", "val", "--num_ways", 2, "--num_shots", 2, "--output_dir", tmp_path)
    launch(*command)
    expected = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    remove_folder(tmp_path / "support")
    launch(*command)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == expected
    launch(*command, "--episode", 1, code=2)


def test_what_fails_inside_is_laid_to_the_file_and_a_message_stays_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"x\.json is damaged, or of another version or project \(KeyError: 'mean'\)"):
        with blaming(tmp_path / "x.json"):
            {}["mean"]
    with pytest.raises(UserError, match=r"^give another$"), blaming(tmp_path / "x.json"):
        raise UserError("give another")


def test_classes_that_were_interrupted_with_two_settings_are_inverted_once(tmp_path):
    args = Namespace(output_dir=tmp_path, null_text_batch_size=2, class_batch_size=5)
    for steps in (1, 2):
        settings = {name: {"max_train_steps": steps} for name in ("a", "b", "c")}
        begin(["a", "b"], settings, args)
    assert batches(tmp_path, ["a", "b", "c"], settings, args, 1) == [["a", "b"], ["c"]]
    assert batches(tmp_path, ["a", "b", "c"], settings | {"a": {}}, args, 1) == [["a", "b", "c"]]
