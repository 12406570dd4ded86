"""A scan to begin, and a note of the windows that it watches."""

import inspect

from rrvideo import VideoQA

RED = "Is there a red circle?"
QUESTIONS = {
    "red": RED,
    "way": "Which way does the star move?",
    "count": "How many scenes are there?",
    "all": "Describe.",
}
SCHEMA = {"red": "yes/no", "way": ["left", "right"], "count": "number"}


def begin(qa, path, questions=QUESTIONS, *, schema=SCHEMA, every=2.0, window=2.0, **options):
    return qa.scan(path, questions, schema=schema, every=every, window=window, **{"max_new_tokens": 6} | options)


def video_class():
    from rrvideo.pipeline import Video

    return Video


def note_watched(monkeypatch):
    """A list that gets the start of each window that is watched."""
    starts = []
    watch = VideoQA.watch

    def watching(self, path, *, start, **options):
        starts.append(start)
        return watch(self, path, start=start, **options)

    watching.__signature__ = inspect.signature(watch)
    monkeypatch.setattr(VideoQA, "watch", watching)
    return starts
