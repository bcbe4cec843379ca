"""What a tiny run must reach is beyond luck: the binomial distribution is the truth, from scipy."""

import pytest
from scipy.stats import binom

from examples.held_out import LUCK, Row, beyond_chance, report, required, required_cider


@pytest.mark.parametrize(("samples", "chance"), [(111, 1 / 111), (256, 1 / 256), (512, 0.0432), (256, 0.5), (2, 0.5)])
def test_guessing_reaches_what_is_required_in_fewer_than_one_of_a_thousand_runs(samples, chance):
    right = round(beyond_chance(chance, samples) * samples)
    assert binom.sf(right - 1, samples, chance) < LUCK <= binom.sf(right - 2, samples, chance)
    assert required(chance, samples) >= right / samples


def test_two_of_a_hundred_and_eleven_are_chance():
    """A run that had learned nothing ended with this, and was refused for it."""
    assert binom.sf(2, 111, 1 / 111) > 0.05  # three or more
    assert required(1 / 111, 111) == pytest.approx(6 / 111)


def test_three_times_a_low_baseline_or_half_the_error_of_a_high_one():
    assert required(0.01, 10_000) == pytest.approx(0.03) and required(0.3, 1000) == pytest.approx(0.9)
    assert required(0.5, 1000) == pytest.approx(0.75)
    assert required(0.0, 10) == 0.0


def test_what_is_said_in_other_words_counts():
    assert required_cider(0.4) == pytest.approx(1.2)
    assert not Row("art", "CIDEr-D", 0.0, 0.0, 0.0, required_cider(0.0)).holds


@pytest.mark.parametrize(("trained", "require", "status"), [(0.6, True, 1), (0.6, False, 0), (0.76, True, 0)])
def test_a_table_fails_below_what_is_required(tmp_path, capsys, trained, require, status):
    rows = [Row("pairs", "matching", trained, 0.5, 0.5, required(0.5, 1000)), Row("pairs", "other", 0.0, 0.0, 0.5)]
    assert report(rows, tmp_path / "results.json", require) == status
    assert ("matching of pairs is 0.600, below 0.750" in capsys.readouterr().err) == (status == 1)
