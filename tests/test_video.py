"""Which frames are chosen and how large they become, against qwen-vl-utils' own functions."""

import json
import math
import subprocess
import sys

import av
import numpy as np
import pytest
import qwen_vl_utils.vision_process as qwen
import torch
from av.video.reformatter import Interpolation
from clips import numbered_frames, write_video
from PIL import Image

from rrvideo.errors import BudgetError, VideoError
from rrvideo.video import PixelLimits, _uniform, plan_samples, probe, read_frames, smart_resize


@pytest.fixture(autouse=True)
def qwen_reads_with_decord(monkeypatch):
    monkeypatch.setattr(qwen, "get_video_reader_backend", lambda: "decord")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten seconds of 24 frames, 320 x 240."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", numbered_frames(240, width=320, height=240))


def by_qwen(path, **element):
    """Qwen's frames [frames, 3, height, width] and their numbers."""
    frames, metadata = qwen.fetch_video({"video": str(path), **element}, return_video_metadata=True)
    return frames, [int(index) for index in metadata["frames_indices"]]


@pytest.mark.parametrize("fps", [0.1, 0.5, 1.0, 3.7, 100.0])
@pytest.mark.parametrize("max_frames", [4, 9, 768])
def test_uniform_takes_the_frames_that_qwen_takes(clip, fps, max_frames):
    limits = {"min_pixels": 4 * 28 * 28, "max_pixels": 32 * 28 * 28}
    frames, indices = by_qwen(clip, fps=fps, max_frames=max_frames, **limits)
    plan = plan_samples(clip, fps=fps, max_frames=max_frames, limits=PixelLimits(**limits))
    assert list(plan.indices) == indices
    assert (len(plan.indices), 3, plan.height, plan.width) == frames.shape


@pytest.mark.parametrize("count", [2, 3, 5, 47])
@pytest.mark.parametrize(("name", "rate"), [("a.mp4", 24), ("a.mkv", 30), ("a.mkv", 60), ("a.webm", 25)])
def test_short_videos_at_other_rates_are_sampled_as_qwen_does(tmp_path, name, rate, count):
    codec, options = ("libvpx", {"deadline": "realtime"}) if name == "a.webm" else ("libx264", None)
    path = write_video(tmp_path / name, numbered_frames(count), fps=rate, codec=codec, options=options)
    assert list(plan_samples(path, fps=2).indices) == by_qwen(path, fps=2)[1]


def test_the_rule_is_that_of_qwen_for_videos_of_hours():
    random = np.random.default_rng(0)
    for _ in range(2000):
        first, total = int(random.integers(0, 100_000)), int(random.integers(2, 300_000))
        video_fps, fps = random.choice([24, 25, 30000 / 1001, 30, 60]), random.choice([0.2, 1, 2, 3.3])
        max_frames = int(random.integers(2, 769))
        count = qwen.smart_nframes({"fps": fps, "max_frames": max_frames}, total, video_fps)
        expected = torch.linspace(first, first + total - 1, count).round().long().tolist()
        assert _uniform(first, first + total - 1, video_fps, fps, max_frames, factor=2) == expected


@pytest.mark.parametrize(
    ("start", "end"), [(None, 4.0), (2.5, None), (1.0, 9.0), (1.3, 7.9), (0.02, 0.4), (3.0, 99.0), (9.8, 10.0)]
)
def test_a_clip_is_sampled_as_qwen_does(clip, start, end):
    bounds = {"video_start": start, "video_end": end}
    plan = plan_samples(clip, fps=3, start=start, end=end)
    assert list(plan.indices) == by_qwen(clip, fps=3, **bounds)[1]
    assert plan.times == pytest.approx([index / 24 for index in plan.indices])
    assert (plan.start, plan.end) == (start or 0, min(end or 10, 10))
    warned = "the clip ends at 1:39, but the video at 0:10" in plan.warnings
    assert warned == (end == 99.0)


def test_a_clip_between_two_frames_holds_the_one_on_screen(clip):
    assert plan_samples(clip, start=1.01, end=1.02).indices == (24,)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (10.5, None, r"starts at 0:10 \(10.50 s\), but the video is 0:10 long \(10.00 s\)"),
        (10.0, 12.0, r"starts at 0:10 \(10.00 s\), but the video is 0:10 long"),
        (-1.0, None, "starts at -1 s"),
        (math.inf, None, "starts at inf s"),
        (5.0, 4.0, "ends at 4 s, before it starts; the video is 0:10 long"),
        (5.0, 5.0, "ends at 5 s, before it starts"),
        (None, 0.0, "ends at 0 s, before it starts"),
        (float("nan"), None, "starts at nan s"),
        (None, float("nan"), "ends at nan s"),
    ],
)
def test_a_clip_outside_the_video_is_an_error(clip, start, end, message):
    with pytest.raises(VideoError, match=message):
        plan_samples(clip, start=start, end=end)


def test_the_pixels_are_those_of_qwen(tmp_path):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 40, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((640, 360)))
    path = write_video(tmp_path / "a.mp4", (np.roll(smooth, 2 * number, axis=1) for number in range(48)))
    limits = {"min_pixels": 16 * 28 * 28, "max_pixels": 100 * 28 * 28}
    plan = plan_samples(path, fps=4, limits=PixelLimits(**limits))
    ours = np.stack([frame.image for frame in read_frames(plan)])

    exact = {"format": "rgb24", "interpolation": Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT}
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(**exact) for frame in container.decode(video=0)]
    pictures = torch.from_numpy(np.stack([frames[index] for index in plan.indices])).permute(0, 3, 1, 2)
    bicubic = {"interpolation": qwen.InterpolationMode.BICUBIC, "antialias": True}
    resized = qwen.transforms.functional.resize(pictures, [plan.height, plan.width], **bicubic)
    assert mean_difference(ours, resized) < 0.7

    theirs, _ = by_qwen(path, fps=4, **limits)  # decord turns them into RGB with coarse rounding
    assert mean_difference(ours, theirs) < 3


def mean_difference(ours, theirs):
    """Of images [frames, height, width, 3] and [frames, 3, height, width], in grey levels."""
    return abs(ours.astype(np.float32) - theirs.permute(0, 2, 3, 1).float().numpy()).mean()


def test_sizes_are_those_of_qwen_unless_it_breaks_its_own_maximum():
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(3000):
        height, width = (int(side) for side in np.exp(random.uniform(np.log(16), np.log(3000), 2)))
        max_pixels = float(random.integers(28 * 28, 800 * 28 * 28))
        limits = {"factor": 28, "min_pixels": float(random.uniform(1, max_pixels)), "max_pixels": max_pixels}
        ours, theirs = smart_resize(height, width, **limits), qwen.smart_resize(height, width, **limits)
        if min(theirs) > 0 and theirs[0] * theirs[1] <= max_pixels:
            assert ours == theirs
        else:
            broken += 1
        assert ours[0] * ours[1] <= max_pixels
        assert min(ours) >= 28
        assert ours[0] % 28 == ours[1] % 28 == 0
    assert 0 < broken < 1500
    with pytest.raises(ValueError, match="200 times"):
        smart_resize(10, 3000, **limits)


@pytest.mark.parametrize("tokens", [100_000, 15_000, 240])
def test_the_total_budget_holds_also_where_qwen_breaks_it(clip, tokens):
    total_pixels = tokens * 28 * 28
    plan = plan_samples(clip, fps=24, limits=PixelLimits(total_pixels=total_pixels))
    assert len(plan.indices) == 240
    assert 120 * plan.height * plan.width <= total_pixels
    frames, _ = by_qwen(clip, fps=24, total_pixels=total_pixels)
    spent = 120 * frames.shape[2] * frames.shape[3]
    if tokens >= 15_750:  # at least 1.05 times the minimum for each frame
        assert (plan.height, plan.width) == frames.shape[2:]
    else:
        assert spent > total_pixels


def test_frames_without_room_are_an_error_that_says_how_many_fit(clip):
    limits = PixelLimits(total_pixels=100 * 28 * 28)
    with pytest.raises(BudgetError, match=r"240 frames do not fit .*at most 200 frames"):
        plan_samples(clip, fps=24, limits=limits)
    assert len(plan_samples(clip, fps=24, max_frames=200, limits=limits).indices) == 200


def test_a_clip_without_an_end_ends_with_the_video(clip):
    assert plan_samples(clip, start=2.0, end=math.inf) == plan_samples(clip, start=2.0)


@pytest.mark.parametrize("factor", [1, 4])
def test_frame_counts_are_multiples_of_the_temporal_factor(clip, factor):
    plan = plan_samples(clip, fps=0.7, limits=PixelLimits(temporal_factor=factor))
    assert len(plan.indices) == {1: 7, 4: 4}[factor]


def test_what_makes_no_sense_is_refused(clip):
    for wrong in ({"fps": 0}, {"fps": float("nan")}, {"max_frames": 0}, {"sampling": "random"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            plan_samples(clip, **wrong)
    with pytest.raises(ValueError, match="reader must be"):
        read_frames(plan_samples(clip), reader="opencv")
    for name in ("min_pixels", "max_pixels", "total_pixels", "factor", "temporal_factor"):
        with pytest.raises(ValueError, match=name):
            PixelLimits(**{name: 0})
    with pytest.raises(ValueError, match="max_pixels"):
        PixelLimits(min_pixels=10_000, max_pixels=9_000)


def test_a_thread_of_a_picture_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(2, width=4 * 210, height=4))
    with pytest.raises(VideoError, match=r"a.mp4 cannot be used: one side must be at most 200 times"):
        plan_samples(path)


def test_probing_tells_what_a_file_holds(clip):
    info = probe(clip)
    facts = json.loads(json.dumps(info.to_dict()))
    assert facts.pop("keyframe_count") >= 20
    assert facts.pop("duration") == pytest.approx(10)
    assert facts == {
        "path": str(clip),
        "container": "mov",
        "codec": "h264",
        "width": 320,
        "height": 240,
        "rotation": 0,
        "fps": 24.0,
        "frame_count": 240,
        "warnings": [],
    }


def test_a_stream_can_be_read_again(clip):
    stream = read_frames(plan_samples(clip, fps=0.5))
    first, second = list(stream), list(stream)
    assert [frame.index for frame in first] == [frame.index for frame in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_importing_is_light():
    heavy = "{'torch', 'decord', 'transformers', 'PIL'} & set(sys.modules)"
    script = f"import sys, rrvideo.video; print({heavy} or 'light')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "light"


def test_a_plan_for_another_clip_need_not_read_the_file_again(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(60), fps=20)
    first = plan_samples(path, end=1)
    expected = plan_samples(path, start=1)
    path.unlink()
    assert plan_samples(first.index, start=1) == expected
