"""Watching, as a script does it: what is seen of a file, even a damaged one, and what memory is given back."""

import gc

import pytest
import torch
from clips import numbered_frames, write_video

from rrvideo import Answer, BudgetError, VideoError, VideoQA, engine
from rrvideo.errors import Cancelled
from rrvideo.video import READERS

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(eight_seconds):
    return eight_seconds


@pytest.fixture(scope="module")
def video(qa, clip):
    return qa.watch(clip)


def test_a_clip_is_watched_at_the_rate_asked_for(qa, clip):
    video = qa.watch(clip, start=2.0, end=6.0, fps=2.0)
    answer = video.ask(QUESTION, max_new_tokens=2)

    assert answer.usage.frames == 8
    assert video._watched.prefix.times == pytest.approx([2.0, 3.15, 4.3, 5.45], abs=0.1)
    assert all(2 <= moment.start < moment.end <= 6 for moment in answer.evidence)
    assert qa.watch(clip, fps=8.0, max_frames=6).ask(QUESTION, max_new_tokens=1).usage.frames == 6


def test_keyframes_can_be_asked_for(qa, clip, video):
    keyframes = qa.watch(clip, sampling="keyframes")
    assert {*keyframes.plan.indices} <= {*keyframes.plan.index.keyframes.tolist()}
    assert not {*video.plan.indices} <= {*video.plan.index.keyframes.tolist()}


def test_the_other_reader_can_be_asked_for(qa, clip, video, monkeypatch):
    calls = []

    def read(*arguments, **options):
        calls.append(arguments[1])
        return READERS["pyav"](*arguments, **options)

    monkeypatch.setitem(READERS, "decord", read)
    assert qa.watch(clip, reader="decord").ask(QUESTION).text == video.ask(QUESTION).text
    assert calls == [video.plan.indices]


def test_times_are_in_the_prompt_unless_they_are_not_wanted(qa, clip, video):
    silent = qa.watch(clip, timestamps=False)
    decode = qa.checkpoint.tokenizer.decode

    assert "0:06<|vision_start|>" in decode(video._watched.prefix.input_ids)
    assert "0:0" not in decode(silent._watched.prefix.input_ids)


def test_a_truncated_file_is_watched_as_far_as_it_goes_and_says_so(qa, clip, tmp_path):
    whole = write_video(
        tmp_path / "whole.mp4",
        numbered_frames(192, width=84, height=56),
        container_options={"movflags": "faststart"},  # the index before the pictures, where a cut leaves it alone
    )
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    video = qa.watch(cut)
    answer = video.ask(QUESTION, max_new_tokens=2)

    assert video.warnings
    assert 0 < answer.usage.frames < 8
    assert max(moment.end for moment in answer.evidence) < 6
    assert qa.watch(clip).warnings == ()


def test_damage_that_shows_only_in_decoding_is_told_too(qa, clip, tmp_path):
    content = bytearray(clip.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (tmp_path / "damaged.mp4").write_bytes(content)
    video = qa.watch(tmp_path / "damaged.mp4")

    assert video.plan.warnings == ()
    assert any("damaged places" in warning for warning in video.warnings)
    assert video.ask(QUESTION, max_new_tokens=2).text


def test_what_is_no_video_gets_no_answer(qa, tmp_path):
    (tmp_path / "empty.mp4").touch()
    for name in ("empty.mp4", "missing.mp4"):
        with pytest.raises(VideoError):
            qa.watch(tmp_path / name)


def test_running_out_of_memory_is_told_as_too_many_frames(qa, clip, monkeypatch):
    def watch(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(engine, "watch", watch)
    with pytest.raises(BudgetError, match="8 frames do not fit into the memory of cpu"):
        qa.watch(clip)


def test_watching_can_be_cancelled(qa, clip):
    cancel = engine.Cancel()
    with pytest.raises(Cancelled):
        qa.watch(clip, progress=lambda *_: cancel.cancel(), cancel=cancel)


def test_the_cache_can_be_kept_in_the_memory_of_the_cpu(qa, clip, video, monkeypatch):
    asked, new_cache = [], engine.new_cache
    monkeypatch.setattr(engine, "new_cache", lambda *given: asked.append(given[-1]) or new_cache(*given))

    assert qa.watch(clip, cache="offload").ask(QUESTION).text == video.ask(QUESTION).text
    assert asked == ["offload"]


def test_frames_are_thinned_to_what_fits_where_that_is_wanted(qa, clip, video, monkeypatch):
    room = int(video._watched.prefix.positions.max())  # a position too few
    monkeypatch.setattr("rrvideo.budget.ROOM", qa.checkpoint.context_length - room)
    with pytest.raises(BudgetError, match="8 frames need"):
        qa.watch(clip)
    assert 1 <= qa.watch(clip, fit=True).ask(QUESTION, max_new_tokens=1).usage.frames < 8


def tensors_at(addresses):
    """How many tensors in memory lie there."""
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum(each.untyped_storage().data_ptr() in addresses for each in found)


@pytest.mark.parametrize("how", ["close", "with", "del"])
@pytest.mark.parametrize("opened", [False, True], ids=["watched", "opened"])
def test_closing_a_video_frees_its_cache(qa, clip, tmp_path, how, opened):
    video = qa.watch(clip)
    if opened:
        video.save(tmp_path / "saved")
        video = qa.open(tmp_path / "saved")
    stream = video.stream(QUESTION, max_new_tokens=5)
    next(stream)
    stream.close()
    assert isinstance(video.ask(QUESTION, max_new_tokens=1), Answer)
    layers = video._watched.cache.layers
    held = {part.untyped_storage().data_ptr() for layer in layers for part in (layer.keys, layer.values)}
    assert tensors_at(held) >= 2 * len(layers) == len(held)

    del layers, stream
    if how == "del":
        del video
    elif how == "with":
        with video:
            pass
    else:
        video.close()
    assert tensors_at(held) == 0
    if how != "del":
        with pytest.raises(RuntimeError, match="the video is closed"):
            video.ask(QUESTION)


@pytest.mark.gpu
def test_closing_a_video_gives_the_memory_of_the_gpu_back(folder, clip):
    def allocated():
        torch._C._cuda_clearCublasWorkspaces()  # one for each thread that has multiplied
        return torch.cuda.memory_allocated()

    qa = VideoQA.load(folder, device="cuda")
    qa.watch(clip).close()  # what the first one makes once is not the video's
    before = allocated()
    with qa.watch(clip) as video:
        video.ask(QUESTION)
        assert allocated() > before
    assert allocated() == before
