"""Banks of instructions and the grammar for several tasks."""

import string
from itertools import permutations

import pytest

from ipx2p.data.degradations.tasks import DEGRADATIONS
from ipx2p.data.instructions import BANK_SIZE, bank, combinable, has_bank, read_bank
from ipx2p.errors import InputError

FIXED = {
    "cartoonize": "cartoonize the image",
    "derain": "derain the image",
    "denoise": "denoise the noisy image",
    "deblur": "deblur the blurry image",
    "enhance": "enhance the low-light image",
}
COMBINED = ["+".join(names) for count in (2, 3) for names in permutations(DEGRADATIONS, count)]
DRIFT = "comic caricature sketch anime manga disney pixar watercolor oil colour color vivid vibrant"


def plain(sentence):
    """The sentence without case and punctuation."""
    return "".join(letter for letter in sentence.lower() if letter not in string.punctuation)


@pytest.mark.parametrize("task", ["cartoonize", *DEGRADATIONS, *COMBINED])
def test_sentences_are_different_ascii_and_short(task):
    sentences = bank(task)
    assert len({plain(sentence) for sentence in sentences}) == len(sentences)
    for sentence in sentences:
        assert sentence.isascii() and sentence == sentence.strip()
        # A token of CLIP is at least one character; 77 hold a sentence and two marks.
        assert 1 < len(sentence.replace(" ", "")) <= 75
        assert not {*plain(sentence).split()} & {*DRIFT.split()}


@pytest.mark.parametrize("task", ["cartoonize", *DEGRADATIONS])
def test_a_bank_begins_with_the_fixed_sentence_and_has_many_more(task):
    assert bank(task)[0] == FIXED.get(task, bank(task)[0])
    assert len(bank(task)) >= (50 if task == "cartoonize" else 20)


def test_every_degradation_has_a_bank_alone_and_with_others():
    assert {*combinable()} == {*DEGRADATIONS}
    assert all(has_bank(task) for task in [*DEGRADATIONS, *COMBINED])
    assert not has_bank("denoize") and not has_bank("cartoonize+denoise")


def test_sentences_for_several_tasks_do_not_depend_on_the_order_of_the_names():
    for names in (("denoise", "enhance"), ("derain", "deblur", "denoise")):
        banks = {bank("+".join(order)) for order in permutations(names)}
        assert len(banks) == 1 and len(*banks) == BANK_SIZE


def test_sentences_for_several_tasks_name_each_of_them_in_every_order():
    words = {"rain": "rain", "blur": "blur sharp", "noise": "noise grain"}
    orders = set()
    for sentence in bank("derain+deblur+denoise"):
        places = {
            name: [sentence.find(word) for word in some.split() if word in sentence]
            for name, some in words.items()
        }
        places["rain"] = [place for place in places["rain"] if sentence[place - 1] != "g"]
        if all(places.values()):
            orders.add(tuple(sorted(places, key=lambda name: min(places[name]))))
    assert orders == {*permutations(words)}


def test_sentences_for_several_tasks_are_the_same_everywhere():
    assert bank("denoise+enhance")[:2] == (
        "brighten the image and denoise it",
        "reduce the noise in the image, then correct the exposure",
    )
    assert bank("deblur+denoise")[0] == "deblur the image and denoise it"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("denoize", "no instructions for task 'denoize'; did you mean denoise"),
        ("../banks/denoise", "no instructions for task"),
        ("patterns", "no instructions for task 'patterns'"),
        ("denoise+enhanse", "no phrases for 'enhanse'; did you mean enhance"),
        ("denoise+denoise", "a task appears twice"),
        ("derain+deblur+enhance+denoise", "4 tasks, patterns.txt has none for so many"),
    ],
)
def test_a_task_without_a_bank_is_refused(task, message):
    with pytest.raises(InputError, match=message):
        bank(task)


def test_a_users_file_is_read_without_its_blank_lines(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffm\u00e4ke it dry\r\n\r\n  stop the rain \n".encode())
    assert read_bank(path) == ("m\u00e4ke it dry", "stop the rain")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.txt: No such file"),
        (b"", "mine.txt line 1: no instructions, expected one sentence per line"),
        (b"\n \n", "mine.txt line 1: no instructions"),
        (b"one\ntwo\nthr\xe9e\n", "mine.txt line 3 is not UTF-8"),
    ],
)
def test_a_file_without_sentences_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_bank(path)
