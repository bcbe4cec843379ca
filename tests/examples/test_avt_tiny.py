"""AVT's tiny run: what its report demands (its script is tested in test_common.py)."""

import pytest

from examples.avt_33b.report import required


def test_three_times_a_low_baseline_or_half_the_error_of_a_high_one():
    assert required(0.01) == pytest.approx(0.03) and required(0.3) == pytest.approx(0.9)
    assert required(0.5) == pytest.approx(0.75)
