"""Fixtures of the tests that give command lines; they name this a plugin."""

import json

import pytest

from rrvideo import cli


@pytest.fixture
def model(folder):
    """The model, as a command line names it."""
    return str(folder)


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


@pytest.fixture
def weights(folder):
    """Weights for the heads of the model, and where they are written."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    return [[1.5, *[0.9] * (config["num_attention_heads"] - 1)]] * config["num_hidden_layers"]
