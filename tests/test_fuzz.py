"""A few of the bad inputs of `python -m tests.fuzz`, the same in every run."""

import pytest

from tests.fuzz import make_base, try_case


@pytest.fixture(scope="module")
def base(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    make_base(folder, run_dir)
    return folder


@pytest.mark.parametrize("seed", range(0, 60, 10))
def test_bad_input_gets_one_message_or_does_no_harm(seed, base, tmp_path):
    results = [try_case(number, base, tmp_path) for number in range(seed, seed + 10)]
    assert not [wrong for wrong, _ in results if wrong]
    assert 2 in [code for _, code in results]
