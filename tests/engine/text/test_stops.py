from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.stops import StopMatcher

ABC = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The meaning, spelled out: the first end at which a stop string is complete, and the longest one there."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@settings(deadline=None)  # machines under load are slow, not wrong
@given(ABC, STOPS, st.lists(st.integers(0, 99), max_size=8), st.booleans())
def test_any_cutting_shows_what_the_plain_search_shows(text, stops, places, include_stop):
    matcher = StopMatcher(stops, include_stop)
    shown, read = "", ""
    for piece in cut(text, places):
        more, matched = matcher.push(piece, num_tokens=1)
        shown, read = shown + more, read + piece
        if matched is None:
            assert len(read) - len(shown) <= max(map(len, stops)) - 1, "more is held back than could become a stop"
    found = first_match(text, stops)
    if found is None:
        assert (shown + matcher.flush(), matcher.matched) == (text, None)
    else:
        end, stop = found
        assert (shown, matcher.matched) == (text[: end if include_stop else end - len(stop)], stop)
        assert matcher.flush() == ""


@settings(deadline=None)  # machines under load are slow, not wrong
@given(ABC, ABC, STOPS)
def test_text_of_the_first_min_tokens_is_shown_at_once_and_never_matched(before, after, stops):
    matcher = StopMatcher(stops, min_tokens=2)
    assert matcher.push(before, 2) == (before, None)
    late = StopMatcher(stops)
    assert matcher.push(after, 3) == late.push(after, 1)


def test_a_stop_string_may_span_many_tokens():
    matcher = StopMatcher(["\n\ndef"])
    pieces = [matcher.push(piece, k) for k, piece in enumerate(["return x\n", "\nd", "e", "f g"], 1)]
    assert pieces == [("return x", None), ("", None), ("", None), ("", "\n\ndef")]


def test_held_text_comes_out_when_it_became_no_stop_string():
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a <en", 1) == ("a ", None)
    assert matcher.push("try>", 2) == ("<entry>", None)


def test_a_stop_string_that_repeats_itself_is_found_after_a_false_start():
    matcher = StopMatcher(["aab"], include_stop=True)
    assert matcher.push("aaab!", 1) == ("aaab", "aab")


def test_of_two_stop_strings_completed_together_the_longer_is_reported():
    assert StopMatcher(["b", "ab"]).push("xab", 1) == ("x", "ab")


def test_nothing_is_shown_after_a_match():
    matcher = StopMatcher(["."])
    assert matcher.push("One. Two.", 1) == ("One", ".")
    assert matcher.push("more", 2) == ("", ".")


def test_without_stop_strings_text_passes_through():
    matcher = StopMatcher([])
    assert matcher.push("all of it", 1) == ("all of it", None)
    assert matcher.flush() == ""
