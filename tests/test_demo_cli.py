"""What `rrvideo demo` refuses before it loads anything."""

import sys

import pytest

from rrvideo import cli


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "must be 65535 at most, got '99999'"),
        (["--port", "0"], "must be a whole number above 0, got '0'"),
        (["--max-length", "0"], "must be a time such as 1:30:00, got '0'"),
        (["--max-length", "1:99"], "must be a time such as 1:30:00, got '1:99'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_wrong_usage(options, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("rrdemo.studio.Studio.load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", *options])

    assert ended.value.code == 2
    assert said in capsys.readouterr().err
