"""The text of a sample against its flags: what stays, what is drawn, and how often."""

import numpy as np

from data.captions import Captions

TAGS = ["character:nova", "red hair", "glasses", "smile", "hat"]
CAPTION = "A girl with Red hair, smiling, in the SUN."
N = 4000


def texts(caption: str, tags: list[str], **flags: object) -> list[str]:
    captions = Captions(**{"caption_empty": 0.0, **flags})
    return [captions.say(caption, tags, np.random.default_rng([7, p])) for p in range(N)]


def near(count: int, share: float) -> bool:
    """Within 5 standard deviations of a binomial draw."""
    return abs(count - N * share) <= 5 * (N * share * (1 - share)) ** 0.5


def test_without_chance_a_text_is_the_caption_or_the_tags_as_they_are():
    assert set(texts(CAPTION, TAGS, caption_share=1.0)) == {CAPTION}
    assert set(texts(CAPTION, TAGS, caption_share=0.0)) == {", ".join(TAGS)}
    assert set(texts(CAPTION, [], caption_share=0.0)) == {CAPTION}
    assert set(texts("", TAGS, caption_share=1.0)) == {", ".join(TAGS)}
    assert set(texts("", [])) == {""}


def test_shares_are_those_asked_for():
    drawn = texts(CAPTION, TAGS, caption_share=0.3, caption_empty=0.2)
    assert near(drawn.count(""), 0.2)
    assert near(drawn.count(CAPTION), 0.8 * 0.3)
    left = texts("", TAGS, caption_drop=0.25)
    for tag in TAGS:
        assert near(sum(tag in text.split(", ") for text in left), 0.75), tag


def test_kept_tags_stay_first_and_the_others_take_every_order():
    drawn = texts("", TAGS, caption_shuffle=True, caption_keep=2)
    assert {tuple(text.split(", ")[:2]) for text in drawn} == {tuple(TAGS[:2])}
    assert len(set(drawn)) == 6  # 3!
    for text in set(drawn):
        assert near(drawn.count(text), 1 / 6), text
    assert set(texts("", TAGS, caption_drop=1.0, caption_keep=2)) == {", ".join(TAGS[:2])}


def test_no_flag_moves_what_another_one_draws():
    plain = texts(CAPTION, TAGS, caption_share=0.5)
    other = texts(CAPTION, TAGS, caption_share=0.5, caption_shuffle=True, caption_drop=0.5)
    assert [text == CAPTION for text in plain] == [text == CAPTION for text in other]
    nulls = texts(CAPTION, TAGS, caption_share=0.5, caption_empty=0.3)
    assert all(text in ("", before) for text, before in zip(nulls, plain, strict=True))
