"""What models write when they are asked for a letter, and which one they mean."""

import pytest

from rreval.letters import parse_letter

FRUIT = ("A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number.")
ODD = ("A. red circle", "B. Vitamin C", "C. A dog", "D. circle")

CASES = [
    ("C", "C"),
    ("c", "C"),
    ("C.", "C"),
    ("(C)", "C"),
    ("[C]", "C"),
    ("**C**", "C"),
    (" C\n", "C"),
    ("（Ｃ）", "C"),
    ("a", "A"),
    ("A.", "A"),
    ("b)", "B"),
    ("C. Berries.", "C"),
    ("C.Berries", "C"),
    ("(C) Berries", "C"),
    ("c. berries", "C"),
    ("C: Berries", "C"),
    ("C - Berries", "C"),
    ("C\n\nThe apples are A, the candles B.", "C"),
    ("Berries", "C"),
    ("berries.", "C"),
    ("There are more berries.", "C"),
    ("The answer is C", "C"),
    ("The answer is: c", "C"),
    ("Answer: C", "C"),
    ("Answer is C", "C"),
    ("answer: **C**", "C"),
    ("The best answer is: (C) Berries.", "C"),
    ("The correct option is:\n\nC", "C"),
    ("The final answer is $\\boxed{C}$.", "C"),
    ("\\boxed{\\text{C}}", "C"),
    ("<answer>C</answer>", "C"),
    ("Option C is correct.", "C"),
    ("C is the correct answer, not A.", "C"),
    ("I would choose C because A is less likely.", "C"),
    ("答案是C", "C"),
    ("The answer is A because there are many.", "A"),
    ("A is clearly the best answer.", "A"),
    ("First, A is wrong: there are few apples. B was not shown. Therefore, the answer is C.", "C"),
    ("Apples and candles are few. So C.", "C"),
    ("The answer is A. No, wait: the answer is C.", "C"),
    ("It's not A. It's C.", "C"),
    ("<think>A? Perhaps B.</think>\n\nC", "C"),
    ("", None),
    ("E", None),
    ("I cannot tell.", None),
    ("None of the above", None),
    ("A person walks a dog.", None),
    ("The answer is a person.", None),
    ("The answer isn't A.", None),
    ("We'd see it in 3D, I'd say.", None),
    ("A or C", None),
    ("A/C", None),
    ("A, C", None),
    ("The answer is A or C.", None),
    ("B. or C.", None),
    ("There are more berries than candles.", None),
    ("Respond with only the letter (A, B, C, or D)", None),
    ("\n".join(FRUIT), None),
    ("<think>Is it A?", None),
]


@pytest.mark.parametrize(("response", "letter"), CASES, ids=[repr(response)[:40] for response, _ in CASES])
def test_the_letter_that_a_response_means_is_read(response, letter):
    assert parse_letter(response, FRUIT) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Vitamin C", "B"),
        ("The answer is Vitamin C.", "B"),
        ("It shows vitamin C, of course.", "B"),
        ("A dog", "C"),
        ("a dog", "C"),
        ("A dog is seen.", "C"),
        ("red circle", "A"),
        ("It is the red circle.", "A"),
        ("circle", "D"),
        ("A red one", None),
    ],
)
def test_letters_and_words_in_the_options_themselves_do_not_confuse(response, letter):
    assert parse_letter(response, ODD) == letter


def test_where_options_are_letters_the_letter_before_the_option_counts():
    assert parse_letter("B", ("A. B", "B. A", "C. C", "D. D")) == "B"


@pytest.mark.parametrize(("response", "letter"), [("C", None), ("B", "B"), ("the answer is C", None)])
def test_a_letter_that_no_option_has_is_none(response, letter):
    assert parse_letter(response, FRUIT[:2]) == letter
