"""What files a chat takes, and what a look at one can do to the machine: nothing."""

import errno
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from clips import numbered_frames, write_video

from rrdemo import guard
from rrdemo.guard import Limits, check
from rrvideo import VideoError
from rrvideo.video import probe

NAME = "our <holiday>.mp4"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of 128 x 96."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(48), audio=True)


def refused(path, **limits):
    with pytest.raises(VideoError) as refusal:
        check(path, Limits(**limits), name=NAME)
    return refusal.value


def test_a_video_is_described(clip):
    info = check(clip, Limits(), name=NAME)

    assert (info.width, info.height, info.frame_count, info.codec, info.container) == (128, 96, 48, "h264", "mov")
    assert info.duration == pytest.approx(2, abs=0.01)
    assert info.warnings == ()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"upload_bytes": 1000}, "0.0 MB is the most"),
        ({"duration": 1.5}, "is 0:02 long, and 0:01 is the most"),
        ({"pixels": 128 * 96 - 1}, "are 128 x 96, and 12,287 pixels are the most"),
        ({"frames": 47}, "has 48 frames, and 47 are the most"),
    ],
    ids=["size", "duration", "resolution", "frames"],
)
def test_what_is_too_much_is_refused_in_plain_words(clip, monkeypatch, limits, said):
    monkeypatch.setattr(guard, "_look_from_afar", lambda *_: probe(clip))
    error = refused(clip, **limits)

    assert said in error.message
    assert NAME in error.message
    assert error.hint


def test_a_file_that_is_too_large_is_not_even_looked_at(clip, monkeypatch):
    monkeypatch.setattr(guard, "_look_from_afar", lambda *_: pytest.fail("it was opened"))
    refused(clip, upload_bytes=1000)


@pytest.mark.parametrize("kind", ["playlist", "list of files", "cut"])
def test_what_is_no_whole_video_is_refused_under_the_name_its_owner_knows(clip, tmp_path, kind):
    content = {
        "playlist": f"#EXTM3U\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n".encode(),
        "list of files": f"ffconcat version 1.0\nfile '{clip}'\n".encode(),
        "cut": clip.read_bytes()[: clip.stat().st_size // 2],
    }[kind]
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    error = refused(path)

    assert NAME in error.message
    assert "video.mp4" not in f"{error}"


def test_a_codec_that_is_not_known_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mkv", numbered_frames(4), codec="ffv1")
    assert f"the video of {NAME} is in a format that is not taken (ffv1)" in refused(path).message

    monkeypatch.setattr("rrvideo.video.probe", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(VideoError, match="ffv1"):
        guard._look(str(path))


def confined(script, seconds=5, memory=2**32):
    """What a process says that is confined and then runs `script`, and how it ended."""
    lines = ["import av, os, socket", "from rrdemo.guard import confine"]
    lines += [f"confine({seconds}, {memory})", script]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_beside_one_file_a_confined_process_reaches_nothing(clip):
    deeds = ("open(clip)", "socket.socket()", "os.pipe()", "av.open(clip)", "av.open('tcp://127.0.0.1:9')")
    lines = [f"clip = {str(clip)!r}", "with open(clip, 'rb') as file:", "    print(len(file.read(10)))"]
    for deed in deeds:
        lines += ["    try:", f"        {deed}", "    except OSError as error:", "        print(error.errno)"]
    lines += ["try:", "    bytearray(2**32)", "except MemoryError:", "    print('no memory')"]

    assert confined("\n".join(lines)).stdout.split() == ["10", *[str(errno.EMFILE)] * len(deeds), "no", "memory"]


def test_a_confined_process_writes_nothing_and_cannot_get_free(tmp_path):
    target = tmp_path / "written"
    free = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"

    assert "File too large" in confined(f"os.write(os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY), b'x')").stderr
    assert target.read_bytes() == b""
    assert confined(f"os.getuid() or os.setuid(65534)\n{free}").returncode == 1  # root could


def test_a_confined_process_ends_when_its_time_is_over():
    assert confined("while True: pass", seconds=1).returncode < 0


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("exec sleep 60", subprocess.TimeoutExpired),
        ("exit 3", subprocess.CalledProcessError),
        ("kill -SEGV $$", subprocess.CalledProcessError),
        ("echo '{}'", KeyError),
        ("echo no JSON", ValueError),
    ],
)
def test_a_look_that_fails_or_takes_too_long_is_a_refusal(clip, tmp_path, monkeypatch, caplog, end, cause):
    monkeypatch.setattr(guard, "GRACE", -0.5)
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", f"#!/bin/sh\n{end}\n")))
    error = refused(clip, probe_seconds=1)

    assert error.message.startswith(f"{NAME} is refused")
    assert isinstance(error.__cause__, cause)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_the_other_process_gets_its_limits_and_no_secret_of_the_environment(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    told = f"#!/bin/sh\necho $@ > {tmp_path}/arguments\nenv > {tmp_path}/environment\n"
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", told)))
    refused(clip, probe_seconds=7, probe_bytes=2**30)

    assert (tmp_path / "arguments").read_text() == f"-I -m rrdemo.guard {clip} 7 {2**30}\n"
    found = (tmp_path / "environment").read_text()
    assert "PATH=" in found
    assert "secret" not in found


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="frames must be positive, got 0"):
        Limits(frames=0)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path
