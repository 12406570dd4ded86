"""The vision tower's batched attention against one call per segment, as transformers makes them."""

import pytest
import torch
from checkpoints import FAMILIES, MODEL_CLASSES, make_checkpoint

from rrvideo import families, vision
from rrvideo.vision import use_segment_attention

in_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Per family: the vision tower with our attention, and as transformers alone runs it."""
    loaded = {}
    for family, model_class in MODEL_CLASSES.items():
        folder = make_checkpoint(tmp_path_factory.mktemp(family), family)
        ours, plain = model_class.from_pretrained(folder), model_class.from_pretrained(folder)
        use_segment_attention(ours)
        loaded[family] = ours.model.visual, plain.model.visual
    return loaded


def random_patches(family, grid_thw):
    side = families.FAMILIES[family].spec.patch_size
    return torch.randn(int(grid_thw.prod(1).sum()), 3 * 2 * side**2, generator=torch.Generator().manual_seed(0))


def outputs_of(output):
    """The features of the last layer, and of those before it that Qwen3-VL passes on too."""
    return [output.pooler_output, *getattr(output, "deepstack_features", [])]


@pytest.mark.parametrize(
    "grids",
    [[(5, 6, 8)], [(1, 6, 8)] * 4, [(2, 4, 4), (3, 6, 4), (1, 4, 4)], [(2, 10, 14)]],
    ids=["one-segment", "steps", "several-sizes", "ragged-windows"],
)
@in_each_family
@torch.no_grad()
def test_vision_features_equal_those_of_one_call_per_segment(towers, family, grids):
    ours, plain = towers[family]
    grid_thw = torch.tensor(grids)
    patches = random_patches(family, grid_thw)

    found, expected = ours(patches, grid_thw=grid_thw), plain(patches, grid_thw=grid_thw)

    assert found.pooler_output.shape == (grid_thw.prod(1).sum() // 4, 64)
    for features, theirs in zip(outputs_of(found), outputs_of(expected), strict=True):
        assert (features - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("family", "calls"), [("qwen2_vl", [16, 16]), ("qwen2_5_vl", [16, 16, 16]), ("qwen3_vl", [16, 16, 16])]
)
@torch.no_grad()
def test_segments_of_one_length_are_one_call(towers, monkeypatch, family, calls):
    segments = []
    attention = vision.F.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        segments.append(len(query))
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(vision.F, "scaled_dot_product_attention", count)
    # 2 x 3 visual tokens a step: in Qwen2.5-VL's first layer, one full window and one narrower one for each step.
    grid_thw = torch.tensor([[16, 4, 6]])
    towers[family][0](random_patches(family, grid_thw), grid_thw=grid_thw)

    assert segments == calls


@in_each_family
@torch.no_grad()
def test_a_step_is_encoded_the_same_alone_and_among_others(towers, family):
    tower, _ = towers[family]
    grid_thw = torch.tensor([[3, 6, 4]])
    patches = random_patches(family, grid_thw)
    together = tower(patches, grid_thw=grid_thw).pooler_output
    alone = [tower(part, grid_thw=torch.tensor([[1, 6, 4]])).pooler_output for part in patches.chunk(3)]

    assert (torch.cat(alone) - together).norm() <= 1e-5 * together.norm()


@in_each_family
def test_the_language_model_keeps_its_own_attention(tmp_path, family):
    model = MODEL_CLASSES[family].from_pretrained(make_checkpoint(tmp_path, family), attn_implementation="eager")
    use_segment_attention(model)

    assert model.model.visual.config._attn_implementation == vision.SEGMENT_ATTENTION
    assert model.model.language_model.config._attn_implementation == "eager"
