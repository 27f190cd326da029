"""A little of `python -m tests.soak`: kills, neighbours, full disks and deaths, at random moments that are the same in
every run."""

import pytest

from tests.soak import soak


@pytest.mark.parametrize(
    "name, disturbances, processes",
    [
        ("draw", ("kills", "neighbours", "full_disk"), 1),
        ("invert", ("kills", "neighbours"), 1),
        ("generate", ("kills", "neighbours", "full_disk"), 1),
        ("generate", ("kills", "death"), 2),
        ("distill", ("kills", "neighbours", "full_disk"), 1),
        ("distill", ("death",), 2),
        ("evaluate", ("kills", "full_disk"), 1),
    ],
)
def test_a_disturbed_script_ends_as_an_undisturbed_one(name, disturbances, processes, run_dir, tmp_path):
    results = soak(name, disturbances, run_dir, tmp_path, processes, count=2, seed=0)
    assert results == dict.fromkeys(disturbances)
