import pytest

from rrvideo.video import format_time, parse_clip


@pytest.mark.parametrize(
    ("text", "clip"),
    [
        ("1:30-2:45", (90.0, 165.0)),
        ("90-", (90.0, None)),
        ("-0:45", (None, 45.0)),
        ("1:02:03-1:03:00", (3723.0, 3780.0)),
        ("2.5 - 3.75", (2.5, 3.75)),
        ("0-600", (0.0, 600.0)),
    ],
)
def test_a_clip_is_read_in_seconds(text, clip):
    assert parse_clip(text) == clip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "START-END"),
        ("-", "START-END"),
        ("90", "START-END"),
        ("2:00-1:00", "ends before it starts"),
        ("1:00-1:00", "ends before it starts"),
        ("-0", "ends before it starts"),
        ("1:75-2:00", "up to 59"),
        ("1:60:00-2:00:00", "up to 59"),
        ("one-two", "'one'"),
        ("1-2-3", "'2-3'"),
        ("1:2:3:4-", "'1:2:3:4'"),
        ("nan-", "'nan'"),
    ],
)
def test_what_is_no_clip_is_named(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_clip(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (42.99, "0:42"), (60, "1:00"), (3599.999, "59:59"), (3600, "1:00:00"), (3723.5, "1:02:03")],
)
def test_a_time_is_written_without_its_fraction(seconds, text):
    assert format_time(seconds) == text
