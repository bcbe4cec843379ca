"""VQA accuracy against the challenge's definition, spelt out over subsets, and the blind baseline."""

from itertools import combinations

import pytest

from megatron_mm.evaluation.vqa import BlindBaseline, answer_score, normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A red, shiny Apple.", "red shiny apple"),
        ("the two dogs", "2 dogs"),
        ("1,000.5 m", "1000.5 m"),
        ("Don't", "dont"),
        ("none", "0"),
        ("yes!", "yes"),
        ("left/right", "left right"),
        ("...", ""),
    ],
)
def test_normalise_answer(answer, expected):
    assert normalise_answer(answer) == expected


def test_soft_accuracy_is_the_mean_over_leaving_one_person_out():
    people = ["yes"] * 3 + ["no"] * 4 + ["Maybe."] * 2 + ["a dog"]
    for answer in ("yes", "no", "maybe", "dog", "cat"):
        nine = [[normalise_answer(text) for text in subset] for subset in combinations(people, 9)]
        expected = sum(min(1.0, subset.count(answer) / 3) for subset in nine) / len(nine)
        assert answer_score(answer, people) == pytest.approx(expected)
    assert answer_score("no", people) == 1.0 and answer_score("cat", people) == 0.0


def test_one_reference_is_equality():
    assert vqa_accuracy(["The Circle", "blue", "2"], [["circle"], ["red"], ["two"]]) == pytest.approx(2 / 3)


def test_the_blind_baseline_knows_questions_only():
    train = [("What color?", "red"), ("what  color?", "blue"), ("What color?", "Blue"), ("is it?", "yes")]
    blind = BlindBaseline([*train, ("is it?", "no"), ("is it?", "no")])
    assert blind.answer("WHAT COLOR?") == "blue" and blind.answer("is it?") == "no"
    assert blind.answer("never asked") == "blue"  # as common as "no", and first in the alphabet
    assert blind.accuracy(["what color?", "is it?"], [["blue"], ["yes"]]) == 0.5


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        vqa_accuracy(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="list of at least one"):
        vqa_accuracy(["a"], ["a"])
    with pytest.raises(ValueError, match="training questions"):
        BlindBaseline([])
