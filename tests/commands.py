"""Fixtures of the tests that give command lines; they name this a plugin."""

import pytest
from checkpoints import make_checkpoint
from clips import numbered_frames, write_video

from rrvideo import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(144, width=84, height=56)))


@pytest.fixture
def rrvideo(capsys):
    """Run a command line; returns the exit code, stdout and stderr."""

    def run(*argv):
        try:
            code = cli.main([str(each) for each in argv])
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("RRVIDEO_MODEL", "RRVIDEO_DEBUG"):
        monkeypatch.delenv(name, raising=False)
