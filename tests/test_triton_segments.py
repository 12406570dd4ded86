"""The logsumexps of segments, against dense scores in float64."""

import pytest
import torch

pytest.importorskip("triton")
from rrattention.triton.segments import segment_logsumexp

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log2 0, which the interpreter tells of
]

# Where segments begin: one for all, empty ones, single keys, more than a tile, and queries' own keys over several.
STARTS = {"one": [0], "all-sizes": [0, 1, 1, 2, 7, 71, 199, 200], "within-the-question": [0, 150, 201, 203, 205]}


def make(target, *, queries, keys=207, heads=6, key_heads=2, dim=64):
    """A pass over a cache that has room for more, laid out as Hugging Face does."""
    device, dtype = target
    generator = torch.Generator().manual_seed(queries + dim)
    query = torch.randn(queries, heads, dim, generator=generator).to(device, dtype).transpose(0, 1)
    cache = torch.randn(key_heads, keys + 50, dim, generator=generator).to(device, dtype)
    return 2 * query, cache[:, :keys]


def dense(query, key, starts, scale):
    """[H, Lq, segments], in float64."""
    queries = query.shape[1]
    scores = scale * query.double().unflatten(0, (len(key), -1)) @ key.double()[:, None].mT
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device).triu(1 + key.shape[1] - queries)
    scores = scores.masked_fill(hidden, -torch.inf)
    stops = [*starts[1:], key.shape[1]]
    parts = [scores[..., start:stop].logsumexp(-1) for start, stop in zip(starts, stops, strict=True)]
    return torch.stack(parts, dim=-1).flatten(0, 1)


def segment_logsumexp_of_one(query, key, starts, *, scale):
    (found,) = segment_logsumexp(query[None], [key], starts, scale=scale)
    return found


def assert_equals_dense_scores(query, key, starts, scale):
    starts_there = torch.tensor(starts, dtype=torch.int32, device=key.device)
    assert_is_close(segment_logsumexp_of_one(query, key, starts_there, scale=scale), query, key, starts, scale)


def assert_is_close(found, query, key, starts, scale):
    exact = dense(query, key, starts, scale)
    assert found.dtype == torch.float32
    # Scores of random numbers are some units large. Inputs are exact; a GPU cuts float32 to the 10 bits of TF32.
    tolerance = 2e-2 if query.is_cuda and query.dtype == torch.float32 else 2e-5
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("queries", [1, 11, 40])
def test_each_segment_gets_the_logsumexp_of_what_each_query_sees_of_it(queries, starts, kernel_target):
    query, key = make(kernel_target, queries=queries)
    assert_equals_dense_scores(query, key, starts, 64**-0.5)


@pytest.mark.parametrize("dim", [80, 96, 128, 256])
def test_any_head_dim(dim, kernel_target):
    query, key = make(kernel_target, queries=9, dim=dim)
    assert_equals_dense_scores(query, key, STARTS["all-sizes"], dim**-0.5)


@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (7, 1), (28, 4)])
def test_any_ratio_of_heads(heads, key_heads, kernel_target):
    query, key = make(kernel_target, queries=13, heads=heads, key_heads=key_heads)
    assert_equals_dense_scores(query, key, STARTS["all-sizes"], 0.125)


def test_layers_that_are_looked_at_in_one_go_get_what_each_would_alone(kernel_target):
    layers = [make(kernel_target, queries=11) for _ in range(3)]
    queries, keys = [query * (1 + number) for number, (query, _) in enumerate(layers)], [key for _, key in layers]
    keys[1].neg_()
    starts = torch.tensor(STARTS["all-sizes"], dtype=torch.int32, device=keys[0].device)
    found = segment_logsumexp(torch.stack(queries), keys, starts, scale=0.125)

    for one, query, key in zip(found, queries, keys, strict=True):
        assert_is_close(one, query, key, STARTS["all-sizes"], 0.125)


def test_layers_whose_keys_are_laid_out_differently_are_refused(kernel_target):
    (query, key), (_, longer) = make(kernel_target, queries=2), make(kernel_target, queries=2, keys=208)
    with pytest.raises(ValueError, match="same shape and strides"):
        segment_logsumexp(torch.stack([query, query]), [key, longer], torch.zeros(1), scale=1.0)


def test_a_scale_may_be_negative_and_dims_may_lie_apart(kernel_target):
    query, key = make(kernel_target, queries=5)
    query, key = (each.mT.contiguous().mT for each in (query, key))
    assert_equals_dense_scores(query, key, STARTS["all-sizes"], -0.125)


def test_a_segment_that_a_query_does_not_see_has_no_mass(kernel_target):
    query, key = make(kernel_target, queries=4)
    starts = torch.tensor([0, 206], dtype=torch.int32, device=key.device)  # the last key, and so the last query's own
    shares = segment_logsumexp_of_one(query, key, starts, scale=0.125).softmax(dim=2)

    assert shares[:, :-1, 1].eq(0).all()
    assert shares[:, -1, 1].gt(0).all()


@pytest.mark.gpu
def test_keys_past_two_billion_elements_are_found():
    keys, dim = 2**31 // 256 + 1000, 256
    key = torch.zeros(1, keys, dim, dtype=torch.float16, device="cuda")
    key[0, -100:] = 0.5
    query = torch.ones(1, 1, dim, dtype=torch.float16, device="cuda")
    starts = torch.tensor([0, keys - 100], dtype=torch.int32, device="cuda")
    found = segment_logsumexp_of_one(query, key, starts, scale=1 / 16)

    expected = torch.tensor([keys - 100, 100.0]).log() + torch.tensor([0.0, 8.0])
    torch.testing.assert_close(found[0, 0].cpu(), expected, rtol=1e-4, atol=1e-4)
