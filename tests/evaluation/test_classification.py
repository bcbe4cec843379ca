"""Recall and F1 against a confusion matrix worked out by hand."""

import pytest

from megatron_mm.evaluation.classification import score_class_names, score_classes, word_f1


def test_scores_of_a_confusion_matrix():
    # truth a: 6 (4 right, 2 as b); b: 3 (2 right, 1 as c); c: 1 (predicted d, which is never true)
    truth = ["a"] * 6 + ["b"] * 3 + ["c"]
    predicted = ["a"] * 4 + ["b"] * 2 + ["b"] * 2 + ["c"] + ["d"]
    scores = score_classes(predicted, truth)
    assert (scores.samples, scores.classes) == (10, 3)
    assert scores.weighted_recall == pytest.approx(6 / 10)
    assert scores.unweighted_recall == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    f1_a = 2 * 1.0 * (4 / 6) / (1.0 + 4 / 6)  # precision 4/4, recall 4/6
    f1_b = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    assert scores.macro_f1 == pytest.approx((f1_a + f1_b + 0) / 3)
    assert scores.majority == pytest.approx(6 / 10)


def test_one_class_predicted_for_all_has_the_majoritys_recall():
    scores = score_classes([1] * 4, [1, 1, 2, 3])
    assert scores.weighted_recall == scores.majority == 0.5
    assert scores.unweighted_recall == pytest.approx(1 / 3)


def test_a_class_is_named_whatever_its_case_and_stops():
    scores = score_class_names(["Happy!", "sad", "happy", ""], ["happy", "Sad.", "angry", "angry"])
    assert (scores.classes, scores.weighted_recall) == (3, 0.5)
    assert scores.unweighted_recall == pytest.approx(2 / 3)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)  # happy is said twice


def test_word_f1_counts_shared_words_with_repetition_and_takes_the_best_reference():
    assert word_f1(["the red red apple"], [["red apple"]]) == pytest.approx(2 * 0.5 * 1.0 / 1.5)
    assert word_f1(["Red Apple!", "dog", ""], [["pear", "red apple"], ["cat"], ["cat"]]) == pytest.approx(1 / 3)
    assert word_f1([""], [["..."]]) == 1.0


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="0 predictions for 1 samples"):
        score_classes([], ["a"])
    with pytest.raises(ValueError, match="sample 0 must have a list"):
        word_f1(["a"], ["a"])
