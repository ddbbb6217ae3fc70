"""Names exchanged: consistently in a passage, otherwise nothing else."""

import re

from hypothesis import given
from hypothesis import strategies as st

from trainer.names import NAME, PASSAGE, find_names, rename

NAMES = [f"Name{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)]
STORY = (
    'Then Anna saw the Captain. "Anna," he said, for the Captain knew Anna; and Then he left. An old man, I think.\n'
)


def test_names_are_capitals_inside_sentences():
    assert find_names([STORY, "from Paris, Rome and Anna"]) == ["Anna", "Captain", "Paris", "Rome", "Then"]


def test_a_name_becomes_one_other_everywhere_and_the_rest_stays():
    new = rename(STORY.replace("and Then", "and then"), ["Bert", "Carl", "Dora"], (0,))
    pattern = re.sub("Anna", r"(?P<anna>\\w+)", re.escape(STORY.replace("and Then", "and then")), count=1)
    pattern = pattern.replace("Anna", r"(?P=anna)")
    pattern = re.sub("Captain", r"(?P<captain>\\w+)", pattern, count=1).replace("Captain", r"(?P=captain)")
    found = re.fullmatch(pattern, new)
    assert found
    assert found["anna"] != found["captain"]


@given(text=st.text(alphabet="ABabc ,.\n", max_size=300), seed=st.integers(0, 9))
def test_all_but_names_stays(text, seed):
    new = rename(text, [*find_names([text]), *NAMES], (seed,))
    assert NAME.sub("", new) == NAME.sub("", text)


def test_passages_choose_anew_and_repeatably():
    text = STORY * 400
    new = rename(text, NAMES, (1, 2))
    assert new == rename(text, NAMES, (1, 2))
    assert new != rename(text, NAMES, (1, 3))
    assert len(find_names([new])) > len(find_names([text]))
    passages = PASSAGE.findall(text)
    assert "".join(passages) == text
    assert all(passage.endswith("\n") and 8000 < len(passage) < 8500 for passage in passages[:-1])
