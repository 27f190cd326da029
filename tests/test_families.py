"""Odd ones of timm's families, through a student's whole way. `python -m benchmarks.timm_families` tries many more."""

import pytest

from benchmarks.timm_families import PRECISIONS, prepare, try_family
from tests.conftest import launch


@pytest.mark.parametrize(
    "name, size",
    [
        ("deit_tiny_distilled_patch16_224", 32),  # two heads, position embeddings
        ("xcit_nano_12_p16_224", 32),  # takes any size, and forgets which
        ("fbnetc_100", 32),  # batch normalisation with a constant of its own
        ("mobileone_s0", 32),  # branches that become one
    ],
)
def test_a_student_of_another_kind(name, size, tmp_path):
    prepare(tmp_path)
    found = try_family(name, size, tmp_path)
    assert found["input_size"] == (size, size) and found["parameters"] > 1e6
    for precision, largest in PRECISIONS.items():
        assert found[precision] < largest, precision


def test_a_size_that_a_family_cannot_take_is_refused_before_any_work(tmp_path):
    prepare(tmp_path)
    _, err = launch("distill.py", "--support_dir", tmp_path / "support", "--supports_only", "--student",
                    "mixer_s32_224", "--student_image_size", 64, "--output_dir", tmp_path / "out", code=2)  # fmt: skip
    assert "mixer_s32_224" in err and "Traceback" not in err and "distilling" not in err
    assert not (tmp_path / "out" / "config.json").exists()
