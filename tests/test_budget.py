"""What a video takes is known before it is decoded: the plan and its bytes, against what a watch really takes."""

import json
import shutil
import weakref

import pytest
import torch
from checkpoints import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rrvideo import budget, engine
from rrvideo.cli import SAMPLE
from rrvideo.errors import BudgetError
from rrvideo.model import load
from rrvideo.pipeline import EMBEDDED
from rrvideo.video import PixelLimits, plan_samples, read_frames

SAMPLING = {"fps": 24.0, "max_frames": 768, "timestamps": True}
in_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def narrow(folders, tmp_path_factory):
    """A model with a short context."""
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path_factory.mktemp("narrow") / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = budget.ROOM + 120
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder, attention="full", device="cpu")


def positions(checkpoint, plan):
    prefix = checkpoint.prefix(plan.times, (plan.height, plan.width), timestamps=True)
    return int(prefix.positions.max()) + 1


def test_too_many_frames_are_refused_before_decoding_and_told_how_many_fit(narrow, clip, monkeypatch):
    monkeypatch.setattr("rrvideo.video.read_pyav", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BudgetError) as refusal:
        budget.plan(narrow, clip, **SAMPLING)

    assert "144 frames need " in refusal.value.message
    most = int(refusal.value.hint.split()[0])
    assert f"--max-frames {most}" in refusal.value.hint
    assert 4 <= most < 144
    assert len(budget.plan(narrow, clip, **SAMPLING | {"max_frames": most}).indices) == most
    with pytest.raises(BudgetError):
        budget.plan(narrow, clip, **SAMPLING | {"max_frames": most + 2})


def test_the_number_that_fits_is_the_largest_of_all_numbers(narrow, clip):
    fitting = [
        count
        for count in range(2, 145, 2)
        if positions(narrow, plan_samples(clip, fps=24.0, max_frames=count, limits=narrow.limits)) <= 120
    ]
    found = budget.plan(narrow, clip, **SAMPLING, fit=True)

    assert len(found.indices) == max(fitting)
    assert found == plan_samples(clip, fps=24.0, max_frames=max(fitting), limits=narrow.limits)


@pytest.mark.parametrize("sampling", ["uniform", "keyframes"])
def test_with_fit_frames_are_thinned_and_not_cut_off(narrow, clip, sampling):
    found = budget.plan(narrow, clip, **SAMPLING, sampling=sampling, fit=True)

    assert positions(narrow, found) <= 120
    assert found.sampling == sampling
    assert found.times[0] == 0
    assert found.times[-1] > 5


def test_a_plan_that_fits_is_left_as_it_is(narrow, clip):
    assert budget.plan(narrow, clip, **SAMPLING | {"fps": 1.0}, fit=True) == plan_samples(
        clip, fps=1.0, max_frames=768, limits=narrow.limits
    )


def test_with_fit_the_limit_on_all_pixels_is_kept_too(folders, clip, monkeypatch):
    checkpoint = load(folders["qwen2_vl"], weights=False)
    limits = PixelLimits(min_pixels=56 * 56, max_pixels=56 * 56, total_pixels=10 * 28 * 28)
    tight = type(checkpoint)(**{name: getattr(checkpoint, name) for name in checkpoint.__slots__} | {"limits": limits})

    with pytest.raises(BudgetError, match="ask for at most 20 frames"):
        budget.plan(tight, clip, **SAMPLING)
    assert len(budget.plan(tight, clip, **SAMPLING, fit=True).indices) == 20


def test_no_frame_at_all_fits_a_context_that_is_too_short(narrow, clip, monkeypatch):
    monkeypatch.setattr(budget, "ROOM", narrow.context_length - 3)

    for fit in (False, True):
        with pytest.raises(BudgetError, match="no frame of this video fits"):
            budget.plan(narrow, clip, **SAMPLING, fit=fit)
    plan = plan_samples(clip, limits=narrow.limits)
    found = budget.estimate(narrow, plan)
    assert (found.fits, found.largest_frames) == (False, 0)


def test_frames_are_as_large_as_the_checkpoint_allows(folders, clip):
    checkpoint = load(folders["qwen2_vl"], weights=False)
    chosen = budget.plan(checkpoint, clip, **SAMPLING)

    assert chosen == plan_samples(clip, fps=24.0, limits=checkpoint.limits)


@in_each_family
def test_an_estimate_without_weights_is_what_a_watch_then_takes(folders, clip, family):
    outline, checkpoint = (load(folders[family], device="cpu", weights=weights) for weights in (False, True))
    plan = budget.plan(outline, clip, **SAMPLING | {"fps": 4.0})
    found = budget.estimate(outline, plan, timestamps=True)
    watched = engine.watch(checkpoint, read_frames(plan), timestamps=True)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in checkpoint.model.state_dict().values()}

    assert found.fits
    assert found.frames == found.largest_frames == found.wanted_frames == watched.frames == 24
    assert found.visual_tokens == int(watched.prefix.visual.sum())
    assert found.prompt_tokens == watched.cache.get_seq_length()
    assert found.positions == int(watched.prefix.next_positions(1)[0, 0])
    assert found.context == checkpoint.context_length
    assert found.weight_bytes == pytest.approx(sum(weights.values()), rel=0.01)
    a_token = sum(tensor.nbytes for layer in watched.cache.layers for tensor in (layer.keys, layer.values))
    assert found.kv_bytes == (found.prompt_tokens + budget.ROOM) * a_token / found.prompt_tokens
    assert found.to_dict()["kv_bytes"] == found.kv_bytes


def test_half_precision_takes_half_the_memory(folders, clip):
    whole, half = (
        load(folders["qwen2_vl"], device="cpu", dtype=dtype, weights=False) for dtype in ("float32", "bfloat16")
    )
    plan = budget.plan(whole, clip, **SAMPLING)
    in_float32, in_bfloat16 = (budget.estimate(checkpoint, plan) for checkpoint in (whole, half))

    assert in_float32.kv_bytes == 2 * in_bfloat16.kv_bytes
    assert in_float32.weight_bytes == 2 * in_bfloat16.weight_bytes
    assert in_float32.activation_bytes / 2 < in_bfloat16.activation_bytes < in_float32.activation_bytes


def test_an_estimate_says_what_is_cut_and_what_would_be(narrow, clip):
    plan = plan_samples(clip, fps=24.0, max_frames=100, limits=narrow.limits)
    found = budget.estimate(narrow, plan, timestamps=True)

    assert (found.wanted_frames, found.frames, found.fits) == (144, 100, False)
    thinned = budget.plan(narrow, clip, **SAMPLING, fit=True)
    assert found.largest_frames == len(thinned.indices) < 100
    assert budget.estimate(narrow, thinned, timestamps=True).wanted_frames == 144


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


class OneAfterTheOther:
    """`Stages` without threads, which the dispatch mode could not see into."""

    def __init__(self, cancel):
        pass

    def ahead(self, source, **_):
        return source

    def check(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("attention", ["rr", "full"])
def test_activations_stay_below_their_bound_and_not_far_below(attention, monkeypatch):
    monkeypatch.setattr(engine, "Stages", OneAfterTheOther)
    checkpoint = load(EMBEDDED["tiny"], device="cpu", attention=attention)
    plan = budget.plan(checkpoint, SAMPLE, fps=3.0, max_frames=768, timestamps=None)
    with LiveBytes() as memory:
        watched = engine.watch(checkpoint, read_frames(plan))
    kept = sum(buffer.nbytes for layer in watched.cache.layers for buffer in layer._buffers)

    # Without threads the vision tower and the language model take turns; the bound is for both at once.
    assert memory.peak - kept < budget.estimate(checkpoint, plan).activation_bytes < 4 * (memory.peak - kept)


def test_so_do_those_of_one_chunk_in_each_stage():
    checkpoint = load(EMBEDDED["tiny"], device="cpu")
    plan = budget.plan(checkpoint, SAMPLE, fps=5.0, max_frames=768, timestamps=None)
    frames = list(read_frames(plan))[: budget.chunk_frames(plan, 2)]
    with LiveBytes() as seeing:
        engine._encode(checkpoint, frames)
    tokens = budget.CHUNK_TOKENS
    prefix = checkpoint.prefix(plan.times, (plan.height, plan.width))
    cache, ids, places = engine.new_cache(checkpoint, tokens), prefix.input_ids[:tokens], prefix.positions[:, :tokens]
    with LiveBytes() as reading:
        checkpoint.forward(checkpoint.embed(ids)[None], places[:, None], cache)
    kept = sum(buffer.nbytes for layer in cache.layers for buffer in layer._buffers)

    assert seeing.peak < budget._vision_bytes(checkpoint, plan, tokens) < 4 * seeing.peak
    bound = budget._language_bytes(checkpoint, tokens) + budget._attention_bytes(checkpoint, tokens)
    assert reading.peak - kept < bound < 4 * (reading.peak - kept)
