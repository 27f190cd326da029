"""Odd ones of timm's families, through a student's whole way. `python -m benchmarks.timm_families` tries many more."""

import pytest

from benchmarks.timm_families import PRECISIONS, prepare, try_family


@pytest.mark.parametrize(
    "name, size",
    [
        ("deit_tiny_distilled_patch16_224", 32),  # two heads, position embeddings
        ("xcit_nano_12_p16_224", 32),  # takes any size, and forgets which
        ("fbnetc_100", 32),  # batch normalisation with a constant of its own
        ("mobileone_s0", 32),  # branches that become one
        ("mixer_s32_224", 64),  # layers over all positions, built for one size
    ],
)
def test_a_student_of_another_kind(name, size, tmp_path):
    prepare(tmp_path)
    found = try_family(name, size, tmp_path)
    assert found["input_size"] == (size, size) and found["parameters"] > 1e6
    for precision, largest in PRECISIONS.items():
        assert found[precision] < largest, precision
