"""Dense attention over a cached prefix, against softmax under a token mask in float64."""

import pytest
import torch

from rrattention import dense_attention


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("query_length", [70, 30])
def test_a_scale_need_not_be_positive(scale, query_length):
    q, k, v = (torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    scores = (scale * q.double() @ k.double().mT).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ v.double())[:, :, -query_length:]
    out = dense_attention(q[:, :, -query_length:], k, v, scale=scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("query_length", "key_length"), [(5, 700), (300, 700), (640, 700), (1, 700), (700, 700)])
def test_the_last_query_sees_every_key_and_the_ones_before_it_one_less_each(
    kernel_target, query_length, key_length, dim
):
    device, dtype = kernel_target
    generator = torch.Generator().manual_seed(query_length + dim)
    q, k, v = (
        torch.randn(2, length, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for length, heads in ((query_length, 6), (key_length, 2), (key_length, 2))
    )

    out = dense_attention(q, k, v, scale=0.2)

    scores = 0.2 * q.double() @ k.double().repeat_interleave(3, dim=1).mT
    rows = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    scores = scores.masked_fill(torch.arange(key_length, device=device) > rows, -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(3, dim=1)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
