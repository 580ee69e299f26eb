import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.tasks.words import words


def rouge_l(generated: str, reference: str) -> float:
    predictions = Predictions(1.0, 1.0, {"texts": ([generated], [reference])})
    return score(["rougeL"], predictions)["rougeL"]


SENTENCES = {
    "Russian": ("счёт пришёл поздно", 3),
    "Greek": ("Ο λογαριασμός ήρθε", 3),
    "Arabic": ("وصلت الفاتورة متأخرة", 3),
    "Hebrew": ("שָׁלוֹם עולם", 2),
    "Hindi": ("नमस्ते दुनिया", 2),
    "Tamil": ("வணக்கம் உலகம்", 2),
    "Korean": ("안녕하세요 세계", 2),
    "Amharic": ("ሰላም ለዓለም", 2),
    "Georgian": ("გამარჯობა მსოფლიო", 2),
    "Cherokee": ("ᎣᏏᏲ ᎡᎶᎯ", 2),
    "Vietnamese": ("hoá đơn đến muộn", 4),
    "Chinese": ("今天天气很好", 6),
    "Japanese": ("猫がいる", 4),
    "Thai": ("ที่นี่", 2),  # two consonants, each with its marks
    "Khmer": ("កាហ្វេ", 3),
    "emoji": ("👍🎉", 2),
    "mixed": ("GPU今天2台", 5),
}


@pytest.mark.parametrize(("sentence", "count"), SENTENCES.values(), ids=SENTENCES)
def test_words_are_found_in_every_script(sentence, count):
    assert len(words(sentence)) == count
    assert rouge_l(sentence, sentence) == 1.0
    half = words(sentence)[: count // 2]
    assert rouge_l(" ".join(half), sentence) == pytest.approx(
        2 * len(half) / (len(half) + count)  # precision 1, recall len(half) / count
    )


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_agrees_fully_with_itself(text):
    assert rouge_l(text, text) == 1.0


@given(st.text(st.characters(max_codepoint=127)))
def test_the_words_of_ascii_texts_are_those_of_rouge_score(text):
    assert words(text) == tokenize(text, None)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_composed_and_decomposed_letters_are_the_same(text):
    forms = [words(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")]
    assert forms[0] == forms[1]


def test_letters_with_accents_count():
    assert rouge_l("été", "ôtô") == 0.0
    assert rouge_l("ÉTÉ", "été") == 1.0
    assert rouge_l("straße", "STRASSE") == 1.0


def test_joiners_and_marks_of_direction_separate_no_words():
    assert words("می\u200cخواهم") == words("میخواهم")
    assert words("\u200fשלום\u200f") == ["שלום"]
    assert words("co\u00adoperate") == ["cooperate"]


def test_every_letter_of_unicode_is_part_of_a_word():
    letters = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character)[0] == "L"
    ]
    assert [character for character in letters if not words(character)] == []


def test_texts_without_words_are_compared_as_a_whole():
    assert rouge_l("?!", "?!") == 1.0
    assert rouge_l("?!", "...") == 0.0
    assert rouge_l("?!", "yes") == 0.0
