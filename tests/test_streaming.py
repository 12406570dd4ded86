"""A watch in chunks and threads, against one pass over everything; and what stops it."""

import threading
import time
import traceback
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from clips import numbered_frames, write_video

from rrattention import RRConfig, api
from rrattention.transformers import record
from rrvideo import budget, engine, stages
from rrvideo.errors import Cancelled, VideoError
from rrvideo.model import Checkpoint, load
from rrvideo.tokens import patchify
from rrvideo.video import Frame, plan_samples, read_frames

QUESTION = "What colour is the circle?"
BLOCK = 16
SPARSE = RRConfig(block_size=BLOCK, stride=4, tau=0.5, min_tokens=200)
PAPER = {"scope": "row", "counted": "all", "skipped": "dropped"}  # the rule of RRConfig.paper()
SOON = 10.0  # seconds in which whatever is to happen has happened


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = {*threading.enumerate()}
    yield
    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if not thread.name.startswith("rrattention_")]  # those wait for the next call


@pytest.fixture(scope="module")
def sparse(folders):
    return load(folders["qwen2_vl"], device="cpu", config=SPARSE)


class FakeStream:
    """Some frames of a plan, as a stream."""

    def __init__(self, plan, frames):
        self.plan = plan
        self.frames = frames

    def __iter__(self):
        return iter(self.frames)


def plan_for(checkpoint, clip, *, fps=2.0, timestamps=True):
    return budget.plan(checkpoint, clip, fps=fps, max_frames=768, timestamps=timestamps)


@pytest.fixture
def in_small_chunks(monkeypatch):
    """Two steps of frames are encoded at a time, and a few blocks of tokens prefilled."""
    monkeypatch.setattr(budget, "CHUNK_FRAMES", 4)
    monkeypatch.setattr(engine, "chunk_tokens", lambda device: 4 * BLOCK)


@pytest.fixture
def selections(monkeypatch):
    """The blocks that each sparse call keeps, in the order of the calls; `backend` chooses who finds them."""
    found, stages_of = SimpleNamespace(backend="auto", masks=[]), api._stages

    def spied(backend, like):
        chosen = stages_of(found.backend, like)

        def select(*arguments):
            selection = chosen.select(*arguments)
            found.masks.append(selection.mask()[0])
            return selection

        return SimpleNamespace(estimate=chosen.estimate, select=select, attend=chosen.attend)

    monkeypatch.setattr(api, "_stages", spied)
    return found


def at_once(checkpoint, frames, timestamps=True):
    """Prefix and KV cache of one pass over all frames, with the cache of transformers."""
    pixels = torch.stack([torch.from_numpy(frame.image) for frame in frames])
    grid = torch.tensor([checkpoint.spec.grid(*pixels.shape[:3])])
    prefix = checkpoint.prefix([frame.time for frame in frames], pixels.shape[1:3], timestamps=timestamps)
    features = checkpoint.encode(patchify(pixels, checkpoint.spec), grid)
    embeddings = checkpoint.embed(prefix.input_ids, prefix.visual, features)
    cache = checkpoint.new_cache()
    checkpoint.forward(embeddings[None], prefix.positions[:, None], cache)
    return prefix, cache


def logits_after(checkpoint, prefix, cache):
    ids = checkpoint.question(prefix, [QUESTION])
    return checkpoint.forward(
        checkpoint.embed(ids)[None], prefix.next_positions(len(ids))[:, None], cache, last_only=False
    )


def by_layer(masks, layers):
    """The rows of blocks that each layer kept over all calls, [heads, query blocks, key blocks] each."""
    width = max(mask.shape[-1] for mask in masks)
    padded = [torch.nn.functional.pad(mask, (0, width - mask.shape[-1])) for mask in masks]
    return [torch.cat(padded[layer::layers], dim=1) for layer in range(layers)]


@pytest.mark.parametrize(
    ("backend", "family", "dtype", "fps", "timestamps", "changes"),
    [
        ("cpu", "qwen2_vl", "float64", 2.0, True, {}),
        ("cpu", "qwen2_vl", "float64", 2.0, True, {"dense_last_block": False}),
        ("cpu", "qwen2_vl", "float32", 2.5, False, PAPER),
        ("cpu", "qwen2_5_vl", "float64", 2.0, False, {}),
        ("cpu", "qwen3_vl", "float64", 0.7, True, {"dense_last_block": False}),
        ("reference", "qwen2_vl", "float64", 2.0, True, {}),
        ("reference", "qwen2_vl", "float64", 2.0, True, PAPER),
        ("triton", "qwen2_vl", "float32", 0.7, True, {"block_size": 64}),  # interpreted: as little as makes sense
    ],
)
def test_chunks_select_the_blocks_of_one_pass_and_give_its_logits(
    folders, clip, in_small_chunks, selections, backend, family, dtype, fps, timestamps, changes
):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, and test_triton_attend.py has this for them")
    config = replace(SPARSE, **changes)
    checkpoint = load(folders[family], device="cpu", dtype=dtype, config=config)
    layers = checkpoint.model.config.get_text_config().num_hidden_layers
    selections.backend = backend
    plan = plan_for(checkpoint, clip, fps=fps, timestamps=timestamps)
    watched = engine.watch(checkpoint, read_frames(plan), timestamps=timestamps)
    found, selections.masks = selections.masks, []
    with record() as whole:
        prefix, cache = at_once(checkpoint, [*read_frames(plan)], timestamps)

    assert len(found) >= 3 * layers
    assert len(selections.masks) == layers
    for ours, theirs in zip(by_layer(found, layers), by_layer(selections.masks, layers), strict=True):
        assert torch.equal(ours, theirs)
    assert watched.density == pytest.approx(whole.density())
    assert watched.density < 0.9
    assert torch.equal(watched.prefix.input_ids, prefix.input_ids)
    ours, theirs = (logits_after(checkpoint, prefix, kept) for kept in (watched.cache, cache))
    assert (ours - theirs).norm() <= (1e-12 if dtype == "float64" else 1e-4) * theirs.norm()


@pytest.mark.parametrize("chunk", [1, BLOCK, 5 * BLOCK + 3, 10**6])
def test_every_chunk_begins_at_a_block_and_the_last_is_no_shorter_than_one(sparse, clip, monkeypatch, chunk):
    monkeypatch.setattr(engine, "chunk_tokens", lambda device: chunk)
    sizes, forward = [], Checkpoint.forward
    monkeypatch.setattr(
        Checkpoint,
        "forward",
        lambda self, e, *rest, **more: sizes.append(e.shape[1]) or forward(self, e, *rest, **more),
    )
    watched = engine.watch(sparse, read_frames(plan_for(sparse, clip, fps=1.0)))

    assert sum(sizes) == len(watched.prefix)
    assert all(size == max(chunk // BLOCK, 1) * BLOCK for size in sizes[:-1])
    assert sizes[-1] >= BLOCK


@pytest.mark.parametrize("lost", [(4, 5, 6), (3,), (11,), (8, 9, 10, 11), (0, 1)])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_frames_that_do_not_come_leave_what_one_pass_over_the_others_gives(
    folders, clip, in_small_chunks, selections, family, lost
):
    checkpoint = load(folders[family], device="cpu", config=SPARSE)
    plan = plan_for(checkpoint, clip)
    frames = [frame for number, frame in enumerate(read_frames(plan)) if number not in lost]
    watched = engine.watch(checkpoint, FakeStream(plan, frames))
    prefix, cache = at_once(checkpoint, frames)

    assert watched.frames == 12 - len(lost)
    assert torch.equal(watched.prefix.input_ids, prefix.input_ids)
    assert torch.equal(watched.prefix.positions, prefix.positions)
    ours, theirs = (logits_after(checkpoint, prefix, kept) for kept in (watched.cache, cache))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_plan_decides_whether_attention_is_sparse(folders, clip, in_small_chunks):
    checkpoint = load(folders["qwen2_vl"], device="cpu", config=SPARSE)
    plan = plan_for(checkpoint, clip)
    planned = len(checkpoint.prefix(plan.times, (plan.height, plan.width)))
    frames = [*read_frames(plan)][:6]
    settings = checkpoint.model.config.get_text_config().rrattention["config"]
    for least, is_sparse in ((planned, True), (planned + 1, False)):
        settings["min_tokens"] = least
        assert (engine.watch(checkpoint, FakeStream(plan, frames)).density < 1) == is_sparse


def test_a_chunk_is_decoded_and_another_encoded_while_one_is_prefilled(sparse, clip, in_small_chunks, monkeypatch):
    plan = plan_for(sparse, clip)
    frames, decoded = [*read_frames(plan)], [threading.Event() for _ in plan.times]
    encodings, encoded = [], threading.Event()
    encode, forward = engine._encode, Checkpoint.forward

    class Watchful(FakeStream):
        def __iter__(self):
            for frame, event in zip(frames, decoded, strict=True):
                event.set()
                yield frame

    def encode_and_tell(*arguments):
        encodings.append(len(arguments[1]))
        if len(encodings) == 2:
            encoded.set()
        return encode(*arguments)

    def forward_once_the_others_are_ahead(*arguments, **options):
        assert encoded.wait(SOON)
        assert decoded[8].wait(SOON)  # the first of the third chunk of four
        return forward(*arguments, **options)

    monkeypatch.setattr(engine, "_encode", encode_and_tell)
    monkeypatch.setattr(Checkpoint, "forward", forward_once_the_others_are_ahead)
    assert engine.watch(sparse, Watchful(plan, frames)).frames == 12


def test_the_pixels_of_a_few_chunks_are_all_that_is_held(sparse, clip, in_small_chunks, monkeypatch):
    plan = plan_for(sparse, clip, fps=5.0)
    alive, most = set(), []

    class Counting(FakeStream):
        def __iter__(self):
            for frame in read_frames(plan):
                image = frame.image.copy()
                alive.add(frame.index)
                weakref.finalize(image, alive.discard, frame.index)
                most.append(len(alive))
                yield Frame(frame.index, frame.time, image)

    forward = Checkpoint.forward
    monkeypatch.setattr(Checkpoint, "forward", lambda *a, **k: time.sleep(0.02) or forward(*a, **k))
    watched = engine.watch(sparse, Counting(plan, None))

    assert watched.frames == 30
    assert max(most) <= (budget.CHUNKS_AHEAD + 2) * 4  # in the line, in the encoder, and what is on its way


@pytest.mark.parametrize("where", ["decode", "encode", "prefill", "progress"])
def test_a_watch_is_cancelled_within_a_chunk(sparse, clip, in_small_chunks, monkeypatch, where):
    plan, cancel, calls = plan_for(sparse, clip, fps=8.0), engine.Cancel(), []

    def cancelling(function):
        def called(*arguments, **options):
            calls.append(where)
            cancel.cancel()
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patched:
        stream, progress = read_frames(plan), None
        if where == "decode":
            stream = FakeStream(plan, map(cancelling(lambda frame: frame), read_frames(plan)))
        elif where == "encode":
            patched.setattr(engine, "_encode", cancelling(engine._encode))
        elif where == "prefill":
            patched.setattr(Checkpoint, "forward", cancelling(Checkpoint.forward))
        else:
            progress = cancelling(lambda *_: None)
        with pytest.raises(Cancelled):
            engine.watch(sparse, stream, cancel=cancel, progress=progress)

    assert 1 <= len(calls) <= (4 if where == "decode" else 1)
    assert engine.watch(sparse, read_frames(plan_for(sparse, clip, fps=1.0))).frames == 6


@pytest.mark.parametrize("where", ["decode", "encode", "prefill", "progress"])
def test_an_error_in_any_thread_reaches_the_caller_as_it_is(sparse, clip, in_small_chunks, monkeypatch, where):
    error, plan = ZeroDivisionError("as asked"), plan_for(sparse, clip)

    def break_here(*_, **__):
        raise error

    stream, progress = read_frames(plan), None
    if where == "decode":
        stream = FakeStream(plan, map(break_here, read_frames(plan)))
    elif where == "encode":
        monkeypatch.setattr(engine, "_encode", break_here)
    elif where == "prefill":
        monkeypatch.setattr(Checkpoint, "forward", break_here)
    else:
        progress = break_here
    with pytest.raises(ZeroDivisionError) as failure:
        engine.watch(sparse, stream, progress=progress)

    assert failure.value is error
    assert "break_here" in {frame.name for frame in traceback.extract_tb(failure.value.__traceback__)}


@pytest.mark.parametrize(
    ("gop", "start", "fps", "expected"),
    [(999, 8.0, 2.0, 8.0), (999, 0.0, 2.0, 0.54), (24, 8.0, 2.0, 1.0), (24, 8.25, 2.0, 1.25), (24, 0.0, 0.2, 3.33)],
)
def test_a_reader_may_take_as_long_as_what_it_has_to_decode_plays(sparse, tmp_path, gop, start, fps, expected):
    options = {"sc_threshold": "0", "bf": "0"}
    path = write_video(tmp_path / "a.mp4", numbered_frames(240, width=84, height=56), gop=gop, options=options)
    plan = plan_samples(path, fps=fps, start=start, limits=sparse.limits)
    assert engine._longest_way(plan) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_reader_that_stalls_hangs_nobody(sparse, clip, monkeypatch, cancelled):
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    monkeypatch.setattr(stages, "GRACE", 0.1)
    gate, cancel, plan = threading.Event(), engine.Cancel(), plan_for(sparse, clip)
    before = {*threading.enumerate()}

    class Stalling(FakeStream):
        def __iter__(self):
            yield next(iter(read_frames(plan)))
            if cancelled:
                cancel.cancel()
            gate.wait(SOON)

    start = time.monotonic()
    with pytest.raises(Cancelled if cancelled else VideoError, match="cancelled" if cancelled else "no frame for 0.5"):
        engine.watch(sparse, Stalling(plan, None), cancel=cancel)  # half a second is between two frames of the video
    assert time.monotonic() - start < SOON / 2
    (abandoned,) = {*threading.enumerate()} - before
    assert abandoned.daemon
    gate.set()
    abandoned.join(SOON)


def test_a_cache_of_another_kind_is_refused(sparse, clip):
    with pytest.raises(ValueError, match="cache must be 'device' or 'offload', got 'disk'"):
        engine.watch(sparse, read_frames(plan_for(sparse, clip)), cache="disk")
