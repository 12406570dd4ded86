"""Which frames come out of which files: every frame carries its number, and the tests read it back."""

import shutil
import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import number_of, numbered_frames, write_video

from rrvideo import frameindex, readers
from rrvideo.errors import VideoError
from rrvideo.measuring import repeat_packets
from rrvideo.video import format_time, plan_samples, probe, read_frames

ALL = {"fps": 1000, "max_frames": 10_000}
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
FILES = {
    "mp4": ("a.mp4", {}),
    "mov": ("a.mov", {}),
    "fragmented-mp4": ("a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "mkv": ("a.mkv", {}),
    "vp9-webm": ("a.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp8-webm": ("a.webm", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "mpeg4-avi": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "h264-avi": ("a.avi", {}),  # B-frames in a container that knows only decoding times
    "ts": ("a.ts", {}),
    "mpeg2-ts": ("a.ts", {"codec": "mpeg2video", "options": {"bf": "2"}}),
    "flv": ("a.flv", {}),
    "open-groups-mp4": ("a.mp4", {"options": OPEN_GROUPS}),
    "open-groups-mkv": ("a.mkv", {"options": OPEN_GROUPS}),
    "open-groups-ts": ("a.ts", {"options": OPEN_GROUPS}),
    "hevc-mp4": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4:keyint=20"}}),
    "only-keyframes": ("a.mp4", {"gop": 1}),
    "audio": ("a.mp4", {"audio": True}),
    "odd-sizes": ("a.mp4", {"size": (99, 77)}),
}


def make(folder, name="a.mp4", count=60, *, size=(128, 96), **kwargs):
    return write_video(folder / name, numbered_frames(count, width=size[0], height=size[1]), **kwargs)


def numbers_in(stream):
    return [number_of(frame.image) for frame in stream]


def packets_given_to_the_decoder(monkeypatch):
    given = []
    decode = readers._Decoder.decode

    def spy(self, packet):
        if packet is not None:
            given.append(packet.is_keyframe)
        return decode(self, packet)

    monkeypatch.setattr(readers._Decoder, "decode", spy)
    return given


@pytest.mark.parametrize(("name", "kwargs"), FILES.values(), ids=FILES)
def test_every_frame_is_found_in_order_with_its_own_time(tmp_path, name, kwargs):
    path = make(tmp_path, name, **kwargs)
    info = probe(path)
    assert (info.frame_count, info.fps, info.warnings) == (60, 24, ())
    assert info.duration == pytest.approx(2.5, abs=0.002)

    frames = list(read_frames(plan_samples(path, **ALL)))
    assert [frame.index for frame in frames] == list(range(60))
    assert [number_of(frame.image) for frame in frames] == list(range(60))
    assert [frame.time for frame in frames] == pytest.approx([number / 24 for number in range(60)], abs=0.001)


@pytest.mark.parametrize(("name", "kwargs"), FILES.values(), ids=FILES)
def test_sparse_frames_and_keyframes_are_the_right_ones(tmp_path, name, kwargs, monkeypatch):
    monkeypatch.setattr(readers, "SEEK_SAVES_DECODING", 0)
    monkeypatch.setattr(readers, "SEEK_SAVES_READING", 0)
    path = make(tmp_path, name, 120, **kwargs)
    for start in (0.0, 1.3):
        for sampling in ("uniform", "keyframes"):
            plan = plan_samples(path, fps=3, start=start, sampling=sampling)
            stream = read_frames(plan)
            assert numbers_in(stream) == list(plan.indices)
            assert stream.warnings == list(plan.warnings)


def test_keyframes_are_the_nearest_to_each_moment_and_nothing_else_is_decoded(tmp_path, monkeypatch):
    path = make(tmp_path, count=200, gop=17)
    with av.open(str(path)) as container:
        keyframes = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    uniform = plan_samples(path, fps=2)
    nearest = sorted({min(keyframes, key=lambda key: abs(key - number)) for number in uniform.indices})

    given = packets_given_to_the_decoder(monkeypatch)
    plan = plan_samples(path, fps=2, sampling="keyframes")
    assert list(plan.indices) == nearest
    assert numbers_in(read_frames(plan)) == nearest
    assert given == [True] * len(nearest)


def test_a_keyframe_stands_in_where_the_clip_has_none(tmp_path):
    path = make(tmp_path, gop=30, options={"sc_threshold": "0"})
    plan = plan_samples(path, start=1.0, end=1.2, sampling="keyframes")
    assert numbers_in(read_frames(plan)) == [30]
    assert "no keyframe lies in the clip: the nearest outside it are used" in plan.warnings


def test_far_apart_frames_are_sought_and_those_nearby_are_not(tmp_path, monkeypatch):
    path = make(tmp_path, count=480, gop=24, options={"sc_threshold": "0", "bf": "0"})
    given = packets_given_to_the_decoder(monkeypatch)
    plan = plan_samples(path, fps=0.2)  # 4 frames of 20 seconds
    assert numbers_in(read_frames(plan)) == list(plan.indices) == [0, 160, 319, 479]
    assert len(given) == 1 + (160 - 144 + 1) + (319 - 312 + 1) + (479 - 456 + 1)


def test_frames_are_decoded_only_as_they_are_taken(tmp_path, monkeypatch):
    path = make(tmp_path, count=400)
    given = packets_given_to_the_decoder(monkeypatch)
    frames = iter(read_frames(plan_samples(path, **ALL)))
    assert number_of(next(frames).image) == 0
    assert len(given) < 100  # the decoder's own delay


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_times_count_from_the_first_frame(tmp_path, name):
    plan = plan_samples(make(tmp_path, name, pts=range(240, 300)), fps=1000, start=1.0)
    assert plan.times[0] == pytest.approx(1.0, abs=0.001)
    assert numbers_in(read_frames(plan)) == list(range(24, 60))


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_frames_at_a_variable_rate_keep_their_own_times(tmp_path, name):
    pts = [0, 1, 2, 30, 31, 60, 61, 62, 90, 200]
    path = make(tmp_path, name, 10, pts=pts, time_base=Fraction(1, 30))
    assert probe(path).duration == pytest.approx(201 / 30, abs=0.05)
    assert probe(path).fps == pytest.approx(10 / (201 / 30), rel=0.01)
    assert probe(path).warnings == ()
    frames = list(read_frames(plan_samples(path, **ALL)))
    assert [frame.time for frame in frames] == pytest.approx([stamp / 30 for stamp in pts], abs=0.001)
    assert [number_of(frame.image) for frame in frames] == list(range(10))


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    path = make(tmp_path, count=40, gop=50, pts=range(-10, 30), container_options={"avoid_negative_ts": "disabled"})
    assert probe(path).frame_count == 30
    assert numbers_in(read_frames(plan_samples(path, **ALL))) == list(range(10, 40))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotated_frames_come_upright(tmp_path, clockwise, reader):
    upright = numbered_frames(12, width=128, height=64)
    coded = (np.rot90(image, clockwise // 90) for image in upright)  # counter-clockwise, like the display matrix
    path = write_video(tmp_path / "a.mp4", coded, rotation=-clockwise)
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (128, 64, clockwise)
    plan = plan_samples(path, **ALL)
    assert plan.width > plan.height
    assert numbers_in(read_frames(plan, reader=reader)) == list(range(12))


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_mirrored_frames_are_mirrored_back(tmp_path, clockwise):
    upright = numbered_frames(12, width=128, height=64)
    coded = (np.rot90(image[:, ::-1], clockwise // 90) for image in upright)
    path = write_video(tmp_path / "a.mp4", coded, rotation=-clockwise, mirrored=True)
    assert numbers_in(read_frames(plan_samples(path, **ALL))) == list(range(12))
    with pytest.raises(VideoError, match="decord"):
        list(read_frames(plan_samples(path, **ALL), reader="decord"))


def test_the_picture_may_change_its_size_midway(tmp_path):
    small = make(tmp_path, "small.ts", 24).read_bytes()
    large = make(tmp_path, "large.ts", 24, size=(192, 144), pts=range(24, 48)).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(small + large)
    plan = plan_samples(path, fps=8)
    frames = list(read_frames(plan))
    assert {frame.image.shape for frame in frames} == {(plan.height, plan.width, 3)}
    assert number_of(frames[-1].image) == 23


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_video_of_few_frames_gives_them(tmp_path, count):
    path = make(tmp_path, count=count)
    assert numbers_in(read_frames(plan_samples(path))) == {1: [0], 2: [0, 1], 3: [0, 2]}[count]
    assert numbers_in(read_frames(plan_samples(path, sampling="keyframes"))) == [0]


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.webm", "cut.avi"])
def test_a_truncated_file_yields_what_decodes_and_says_what_was_lost(tmp_path, name):
    codec = {"cut.webm": "libvpx-vp9", "cut.avi": "mpeg4"}.get(name, "libx264")
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx-vp9" else None
    faststart = {"movflags": "faststart"} if name == "cut.mp4" else None
    path = make(tmp_path, name, 120, size=(320, 240), codec=codec, options=options, container_options=faststart)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])

    info = probe(path)
    assert 40 < info.frame_count < 90
    assert info.duration < 4
    assert any("ends early, at 0:02 of 0:05" in warning for warning in info.warnings)
    stream = read_frames(plan_samples(path, fps=4))
    numbers = numbers_in(stream)
    assert len(numbers) >= 4
    assert [round(number / 24, 3) for number in numbers] == [round(time, 3) for time in stream.plan.times][
        : len(numbers)
    ]


def test_a_cut_in_the_middle_of_a_transport_stream_is_no_obstacle(tmp_path):
    path = make(tmp_path, "a.ts", gop=20, options=OPEN_GROUPS)
    whole = path.read_bytes()
    path.write_bytes(whole[len(whole) // 188 // 3 * 188 :])
    stream = read_frames(plan_samples(path, **ALL))
    numbers = numbers_in(stream)
    assert numbers == list(range(numbers[0], 60))
    assert len(stream.warnings) == 1
    assert "build on missing pictures" in stream.warnings[0]


@pytest.mark.parametrize("debris", [np.random.default_rng(0).bytes, bytes], ids=["random", "zeros"])
def test_damage_in_the_middle_is_passed_over_with_all_that_builds_on_it_and_told(tmp_path, debris):
    path = make(tmp_path, count=240, size=(320, 240), gop=24, options={"sc_threshold": "0"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 5000] = debris(5000)
    path.write_bytes(data)

    stream = read_frames(plan_samples(path, fps=12))
    frames = list(stream)
    planned = dict(zip(stream.plan.indices, stream.plan.times, strict=True))
    assert [number_of(frame.image) for frame in frames] == [frame.index for frame in frames]
    assert [frame.index for frame in (*frames[:3], *frames[-3:])] == [*list(planned)[:3], *list(planned)[-3:]]
    lost = [time for index, time in planned.items() if index not in {frame.index for frame in frames}]
    assert len(lost) > 3
    told = f"{len(lost)} of 120 frames could not be decoded, between {format_time(lost[0])} and {format_time(lost[-1])}"
    assert told in stream.warnings
    assert any("damaged places met in decoding" in warning for warning in stream.warnings)

    keyframes = plan_samples(path, fps=12, sampling="keyframes")
    assert numbers_in(read_frames(keyframes)) == list(keyframes.indices)  # the others are keyframes no more


def test_a_hole_in_a_steady_video_is_told(tmp_path):
    pts = [*range(30), *range(120, 150)]
    assert probe(make(tmp_path, "hole.mkv", pts=pts)).warnings == ("no frames between 0:01 and 0:05: they are lost",)


def test_an_hour_of_frames_takes_a_few_megabytes_to_index_and_fewer_to_keep(tmp_path):
    loop, taken = make(tmp_path, count=100, size=(32, 32), fps=25), []
    frameindex.scan(loop)  # what is kept once is not of the file
    for turns in (10, 110):
        repeat_packets(loop, tmp_path / "long.mp4", seconds=4, turns=turns)
        tracemalloc.start()
        index = frameindex.scan(tmp_path / "long.mp4")
        taken.append((len(index), *tracemalloc.get_traced_memory()))
        tracemalloc.stop()
    packets, kept, peak = (long - short for short, long in zip(*taken, strict=True))

    assert packets == 10_000
    assert kept / packets < 11  # 0.9 MB for an hour at 25 frames a second
    assert peak / packets < 60


def test_times_that_32_bits_cannot_hold_are_exact(tmp_path):
    pts = [round(number * 2**27) for number in range(24)]  # up to 3 * 2**30
    path = make(
        tmp_path,
        "fine.mp4",
        24,
        pts=pts,
        time_base=Fraction(1, 2**27),
        container_options={"video_track_timescale": str(2**27)},
    )
    index = frameindex.scan(path)

    assert index.stamps.dtype == np.int64 and index.stamps.max() > 2**31
    assert index.times.tolist() == list(range(24))
    assert numbers_in(read_frames(plan_samples(path, **ALL))) == list(range(24))


def test_what_follows_a_jump_back_in_time_is_left_out_and_told(tmp_path):
    path = tmp_path / "both.ts"
    path.write_bytes(make(tmp_path, "first.ts", 60).read_bytes() + make(tmp_path, "again.ts", 24).read_bytes())
    stream = read_frames(plan_samples(path, fps=4, end=2.0))
    assert numbers_in(stream) == [0, 7, 14, 21, 27, 34, 41, 48]
    assert stream.plan.info.frame_count in {59, 60}  # the border may damage the last packet
    assert any("jumps back" in warning for warning in stream.warnings)


def test_a_video_in_which_nothing_decodes_is_an_error_and_not_an_empty_stream(tmp_path, monkeypatch):
    path = make(tmp_path)
    stream = read_frames(plan_samples(path))
    path.write_bytes(make(tmp_path, "other.mp4", pts=range(7, 67), time_base=Fraction(1, 1000)).read_bytes())
    with pytest.raises(VideoError, match=r"none of \d+ frames of a.mp4 can be decoded"):
        list(stream)


@pytest.mark.parametrize(
    "kind", ["mp4", "mkv", "vp9-webm", "mpeg4-avi", "h264-avi", "open-groups-mp4", "hevc-mp4", "odd-sizes", "audio"]
)
def test_decord_gives_the_same_frames(tmp_path, kind):
    name, kwargs = FILES[kind]
    path = make(tmp_path, name, 100, **{"size": (320, 240)} | kwargs)
    for options in ({"fps": 5}, {"fps": 5, "sampling": "keyframes"}, {"fps": 5, "start": 1.0, "end": 3.0}):
        plan = plan_samples(path, **options)
        ours, theirs = list(read_frames(plan)), list(read_frames(plan, reader="decord"))
        assert [frame.index for frame in ours] == [frame.index for frame in theirs] == list(plan.indices)
        assert [frame.time for frame in ours] == [frame.time for frame in theirs] == list(plan.times)
        assert [number_of(frame.image) for frame in theirs] == list(plan.indices)
        for our, their in zip(ours, theirs, strict=True):
            assert np.abs(our.image.astype(int) - their.image.astype(int)).mean() < 2


def test_decord_is_not_trusted_with_files_that_it_reads_wrongly(tmp_path):
    late = make(tmp_path, "a.ts")
    hidden = make(tmp_path, "a.mp4", pts=range(-10, 50), container_options={"avoid_negative_ts": "disabled"})
    for path in (late, hidden):
        with pytest.raises(VideoError, match="use reader='pyav'"):
            list(read_frames(plan_samples(path), reader="decord"))


def test_a_missing_decord_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(VideoError, match=r"decord is not installed .*pip install decord"):
        list(read_frames(plan_samples(make(tmp_path)), reader="decord"))


def test_a_playlist_under_the_name_of_a_video_is_not_followed(tmp_path, monkeypatch):
    make(tmp_path, "secret.ts")
    plain = tmp_path / "plain.mp4"
    plain.write_text("ffconcat version 1.0\nfile secret.ts\n")
    with av.open(str(plain)) as followed:
        assert followed.format.name == "concat"  # so there is something to refuse
    hls = tmp_path / "hls.mp4"
    hls.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsecret.ts\n#EXT-X-ENDLIST\n")
    for playlist in (plain, hls):
        with pytest.raises(VideoError, match="is a playlist, not a video"):
            probe(playlist)
    monkeypatch.setattr(frameindex, "OTHER_FILES", ())  # nor is one that goes unrecognised
    for playlist in (plain, hls):
        with pytest.raises(VideoError, match="cannot be read as a video"):
            probe(playlist)


def test_an_address_is_a_file_name_and_nothing_else(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    for address in ("concat:a.mp4|a.mp4", "file:a.mp4", "http://localhost/a.mp4"):
        with pytest.raises(VideoError, match="there is no file"):
            probe(address)
    shutil.copy("a.mp4", "concat:a.mp4|a.mp4")
    assert probe("concat:a.mp4|a.mp4").frame_count == 60


def test_what_is_no_video_is_said_in_one_line(tmp_path):
    from PIL import Image

    for kind in ("jpeg", "png", "webp", "bmp"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{kind}.mp4", kind)
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("words and words " * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(100_000))
    whole = make(tmp_path, "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    expected = {
        "jpeg.mp4": "is a JPEG picture, not a video",
        "png.mp4": "is a PNG picture, not a video",
        "webp.mp4": "cannot be read as a video",
        "bmp.mp4": "cannot be read as a video",
        "zero.mp4": "is empty",
        "text.mp4": "cannot be read as a video",
        "noise.mp4": "cannot be read as a video|no video, only sound|no frame",
        "cut.mp4": "incomplete or damaged .its end, where an mp4 file keeps its index",
        "sound.mp4": "holds no video, only sound",
        "missing.mp4": "there is no file",
        ".": "is not a file",
    }
    for name, message in expected.items():
        with pytest.raises(VideoError, match=message) as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value)
