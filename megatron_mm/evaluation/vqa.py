"""Visual question answering: accuracy of generated answers, and what is answered without looking.

Answers are compared after the normalisation of the VQA challenge (arXiv:1505.00468): lower case, no articles, number
words as digits, no punctuation. With several people's answers an answer is worth min(1, people who gave it / 3),
averaged over leaving out each person; with one reference that is equality. The blind baseline knows the questions of
the training set and no picture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}


def normalise_answer(answer: str) -> str:
    """Lower-case words and digits: commas inside numbers dropped, other punctuation as spaces, apostrophes removed."""
    text = answer.lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d)", "", text).replace("'", "")
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)  # a full stop goes, a decimal point stays
    words = re.findall(r"[^\W_]+(?:\.\d+)?", text)
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def answer_score(answer: str, references: Sequence[str]) -> float:
    """Worth of one answer, 0 to 1.

    Args:
        references: what each person answered; one reference makes it equality.

    Raises:
        ValueError: no reference.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"an answer needs a list of at least one reference, not {references!r}")
    given, wanted = normalise_answer(answer), [normalise_answer(reference) for reference in references]
    if len(wanted) == 1:
        return float(given == wanted[0])
    agreeing = wanted.count(given)
    # Leaving out each person in turn: those who agree with the answer leave one agreement fewer.
    scores = [min(1.0, (agreeing - (reference == given)) / 3) for reference in wanted]
    return sum(scores) / len(scores)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean worth of the answers, 0 to 1.

    Raises:
        ValueError: no answers, another number of references, or a question without reference.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} questions: there must be as many, and some")
    return sum(map(answer_score, answers, references)) / len(answers)


class BlindBaseline:
    """Answers a question with the answer most often given to it in training; an unknown one with the most common.

    Args:
        questions: pairs of a training question and its answer.

    Raises:
        ValueError: no questions.
    """

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in questions:
            counts[_key(question)][normalise_answer(answer)] += 1
            overall[normalise_answer(answer)] += 1
        if not overall:
            raise ValueError("a blind baseline needs training questions with answers")
        self._answers = {question: _most_common(counter) for question, counter in counts.items()}
        self._default = _most_common(overall)

    def answer(self, question: str) -> str:
        """The answer, without looking."""
        return self._answers.get(_key(question), self._default)

    def accuracy(self, questions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """`vqa_accuracy` of its answers."""
        return vqa_accuracy([self.answer(question) for question in questions], references)


def _key(question: str) -> str:
    return " ".join(question.lower().split())


def _most_common(counter: Counter[str]) -> str:
    return min(counter, key=lambda answer: (-counter[answer], answer))  # ties by alphabet, whatever the order of data
