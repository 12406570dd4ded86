"""What files a chat takes, and a look at each in a process that can do no harm, before anything else touches it.

`python -m rrdemo.guard FILE SECONDS BYTES` is that process: it prints what `check` reads.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from rrvideo.cli import SAMPLE
from rrvideo.clock import format_time
from rrvideo.errors import RRVideoError, VideoError
from rrvideo.video import VideoInfo

__all__ = ["CODECS", "Limits", "check"]

# Decoders that are in wide use and therefore well tested; FFmpeg knows hundreds.
VIDEO_CODECS = "h264 hevc av1 libdav1d vp8 vp9 libvpx libvpx-vp9 mpeg4 mpeg2video mpeg1video h263 theora flv msmpeg4v3 "
VIDEO_CODECS += "wmv1 wmv2 wmv3 vc1 mjpeg png gif prores dvvideo rawvideo"
AUDIO_CODECS = "aac mp3 mp3float mp2 mp2float opus libopus vorbis flac alac ac3 eac3 dca truehd wmav2 wmapro "
AUDIO_CODECS += "pcm_s16le pcm_s16be pcm_s24le pcm_s32le pcm_f32le pcm_u8 pcm_alaw pcm_mulaw amrnb amrwb gsm speex"
CODECS = frozenset(f"{VIDEO_CODECS} {AUDIO_CODECS}".split())

GRACE = 5  # seconds to start Python in, and to die in


@dataclass(frozen=True, slots=True)
class Limits:
    """What a chat takes, so that one person does not take the machine from the others.

    upload_bytes, duration (seconds), pixels (of one picture), frames (in the file): of a video file.
    max_frames: frames that a watch may look at.
    characters: of a question. answer_tokens: of an answer.
    waiting: people who may wait for their turn.
    probe_seconds, probe_bytes: time and memory for the look at a file.

    ValueError names the field that is wrong, and its value.
    """

    upload_bytes: int = 2_000_000_000
    duration: float = 4 * 3600.0
    pixels: int = 4096 * 2304
    frames: int = 2_000_000
    max_frames: int = 768
    characters: int = 4000
    answer_tokens: int = 256
    waiting: int = 20
    probe_seconds: int = 60
    probe_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def check(path: Path, limits: Limits, *, name: str) -> VideoInfo:
    """Say what the file at `path` holds, which its owner calls `name`, if it is a video that `limits` take.

    Only another process opens it: with so much time and memory, and with no network and no second file within reach.
    Raises `VideoError` that says why the file is refused.
    """
    size = path.stat().st_size
    if size > limits.upload_bytes:
        raise VideoError(
            f"{name} has {size / 1e6:,.1f} MB, and {limits.upload_bytes / 1e6:,.1f} MB is the most",
            "cut it, or save it in a lower quality",
        )
    info = _look_from_afar(path, limits, name)
    if info.duration > limits.duration:
        raise VideoError(
            f"{name} is {format_time(info.duration)} long, and {format_time(limits.duration)} is the most",
            "cut it, and ask about one part at a time",
        )
    if info.width * info.height > limits.pixels:
        raise VideoError(
            f"the pictures of {name} are {info.width} x {info.height}, and {limits.pixels:,} pixels are the most",
            "save it in a lower resolution: the model sees less than that anyway",
        )
    if info.frame_count > limits.frames:
        raise VideoError(
            f"{name} has {info.frame_count:,} frames, and {limits.frames:,} are the most",
            "save it at a lower frame rate, or cut it",
        )
    return info


def _look_from_afar(path: Path, limits: Limits, name: str) -> VideoInfo:
    """What the other process says of the file."""
    command = [sys.executable, "-I", "-m", "rrdemo.guard"]
    command += [str(path.absolute()), str(limits.probe_seconds), str(limits.probe_bytes)]
    # It gets no secret that may stand in the environment, and few threads, which take address space.
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limits.probe_seconds + GRACE,
            env={**kept, "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            check=True,
        )
        found = json.loads(done.stdout)
        if "message" in found:
            # The file goes by a name of ours: the person is told theirs.
            raise VideoError(*(found[part].replace(path.name, name) for part in ("message", "hint")))
        return VideoInfo(**{**found, "warnings": tuple(found["warnings"])})
    except (subprocess.SubprocessError, ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).warning("%s is refused: %s %s", path, error, getattr(error, "stderr", ""))
        raise VideoError(
            f"{name} is refused: a look at it fails, or takes over {limits.probe_seconds} seconds, or too much memory",
            "it may be damaged: save it as an mp4 file",
        ) from error


def confine(seconds: int, memory: int) -> None:
    """Take from this process, for good, what a look at one file does not need.

    After it one file can be open at a time, and no socket beside it; nothing can be written to a file, and the process
    ends after `seconds` of computing. It gets no more than `memory` bytes. Raises `RRVideoError` where the system
    offers no such limits.
    """
    try:
        import resource
    except ImportError as error:
        raise RRVideoError("this system cannot confine a process, so no file can be checked", "use Linux") from error

    free = os.open(os.devnull, os.O_RDONLY)  # the next file that is opened gets this number, if that is still allowed
    os.close(free)
    for name, limit in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", free + 1),
    ):
        kind = getattr(resource, name)
        hardest = resource.getrlimit(kind)[1]
        allowed = limit if hardest == resource.RLIM_INFINITY else min(limit, hardest)
        resource.setrlimit(kind, (allowed, allowed))


def _look(path: str) -> dict[str, Any]:
    """What the file holds, as JSON takes it, with codecs of any other kind than ours refused unopened."""
    import av

    from rrvideo.frameindex import CONTAINERS
    from rrvideo.video import probe

    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "codec_whitelist": ",".join(CODECS)}
    try:
        with av.open(f"file:{path}", options=options) as container:
            for stream in container.streams:
                codec = stream.codec_context.name if stream.codec_context else "unknown"
                if stream.type in ("video", "audio") and codec not in CODECS:
                    raise VideoError(
                        f"the {stream.type} of {Path(path).name} is in a format that is not taken ({codec})",
                        "save it as an mp4 file with H.264",
                    )
    except av.FFmpegError as error:
        probe(path)  # says better what is wrong
        raise VideoError(f"{Path(path).name} cannot be read as a video") from error
    return probe(path).to_dict()


def _rehearse() -> None:
    """Import what PyAV and NumPy would import in the middle of their work: behind the closed door they cannot."""
    import av

    for module in walk_packages(av.__path__, "av."):  # of each, when it meets a stream of its kind
        if not module.name.endswith("__main__"):
            import_module(module.name)
    _look(str(SAMPLE))


def main() -> None:
    path, seconds, memory = sys.argv[1:]
    _rehearse()
    try:
        confine(int(seconds), int(memory))
        found = _look(path)
    except RRVideoError as error:
        found = {"message": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
