"""Which option a model has chosen, read from what it wrote."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["parse_letter"]

LETTERS = "ABCDEFGH"
AROUND = " \t.,:;!?()[]{}<>'\"“”"
# A letter on its own: not one of a word, of "3D", of "D-Day" or of "they'd".
ALONE = re.compile(r"(?<![A-Za-z0-9'’-])[A-Ha-h](?![A-Za-z0-9'’]|-\w)")
LABEL = re.compile(r"\W*[A-Ha-h]\s*[.):,\-–]\s*")  # before an option's own text
ARTICLE = re.compile(
    r"[Aa]\s+(?!(?:is|are|was|because|since|as|and|or|but|which|for|due|given|based|seems?)\b)[a-z]", re.ASCII
)
# What comes before a letter that is the answer, and before one that is not; then what comes after one that is.
ANSWER_IS = re.compile(
    r"(?:\b(?:answer|option|choice|conclusion)\b[^.\n]{0,60}?(?:\bis|\bbe|:|=)|"
    r"\b(?:choose|chose|select|pick|go with|opt for)|\b(?:therefore|thus|hence|so)\b[^.\n]{0,40}?)"
    r"\W*(?:(?:the\s+)?(?:option|choice|letter|answer)\b)?\W*$",
    re.IGNORECASE,
)
IS_NOT = re.compile(
    r"(?:\b(?:not|neither|nor|than)|n't)\s+(?:be\s+)?(?:(?:option|choice|answer)\b)?\W*$", re.IGNORECASE
)
IS_ANSWER = re.compile(
    r"\W*\s(?:is|would be|seems|must be)\s+(?:\w+ly\s+)?(?:the\s+)?(?:most\s+)?"
    r"(?:best|correct|right|answer|likely|accurate|appropriate)\b",
    re.IGNORECASE,
)
ANOTHER = re.compile(r"\W*(?:\s(?:or|and)\s|[/&])\W*[A-H](?![\w'’])|\W*,\s*[A-H]\W*$")  # as good as the one before


def parse_letter(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that `response` chooses, or None where it chooses none, or several.

    In this order: the response, or its first line, is a letter; it says which is the answer, of which the last time
    counts; it begins with an option's letter; it speaks of one letter only, or of one option's text.
    """
    text = _plain(response)
    texts = {letter: _plain(LABEL.sub("", option, count=1)) for letter, option in zip(LETTERS, options, strict=False)}
    first_line = text.partition("\n")[0].strip(AROUND).upper()
    if first_line in texts:
        return first_line
    found = [match for match in ALONE.finditer(text) if _is_choice(match, text, texts)]
    if stated := [match for match in found if _is_stated(match, text)]:
        return None if ANOTHER.match(text, stated[-1].end()) else stated[-1][0].upper()
    mentioned = _mentioned(text, texts)
    repeats_all = len(mentioned) == len(texts)
    if found and not repeats_all and _opens(found[0], text):
        return None if ANOTHER.match(text, found[0].end()) else found[0][0].upper()
    spoken_of = {match[0] for match in found if match[0].isupper()} or set(mentioned)
    return spoken_of.pop() if len(spoken_of) == 1 else None


def _plain(text: str) -> str:
    """The text without reasoning that is marked as such, and without markup."""
    text = unicodedata.normalize("NFKC", text).rpartition("</think>")[2]
    text = re.sub(
        r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}+|<answer>(.*?)</answer>", r" answer: \1\2 ", text, flags=re.S
    )
    return re.sub(r"[*`#$_]+", "", text.partition("<think>")[0]).strip()


def _is_choice(match: re.Match[str], text: str, texts: dict[str, str]) -> bool:
    """Whether a letter may mean an option: it is no article, is not ruled out, and stands in no option's text."""
    if match[0].upper() not in texts or ARTICLE.match(text, match.start()) or IS_NOT.search(text[: match.start()]):
        return False
    return not any(start <= match.start() < end for start, end in _spans(text, texts))


def _is_stated(match: re.Match[str], text: str) -> bool:
    return bool(ANSWER_IS.search(text[: match.start()]) or (match[0].isupper() and IS_ANSWER.match(text, match.end())))


def _opens(match: re.Match[str], text: str) -> bool:
    """Whether the text begins with this letter, as a list's entry does."""
    return not re.search(r"\w", text[: match.start()]) and bool(re.compile(r"\s*[.):\]\-–\n]").match(text, match.end()))


def _mentioned(text: str, texts: dict[str, str]) -> list[str]:
    """The options whose texts occur, but for those that are part of a longer one that does."""
    there = {letter: option for letter, option in texts.items() if _occurrences(option, text)}
    return [
        letter
        for letter, option in there.items()
        if not any(len(other) > len(option) and _occurrences(option, other) for other in there.values())
    ]


def _spans(text: str, texts: dict[str, str]) -> list[tuple[int, int]]:
    return [match.span() for option in texts.values() if len(option) > 1 for match in _occurrences(option, text)]


def _occurrences(option: str, text: str) -> list[re.Match[str]]:
    wanted = re.escape(option.strip(". "))
    return list(re.finditer(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE)) if wanted else []
