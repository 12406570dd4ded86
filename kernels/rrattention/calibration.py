"""How much harm it does to leave out attention mass in each head of a model, found once for a checkpoint.

    weights = calibrate(model, [lambda: model(input_ids=ids, use_cache=False).logits for ids in excerpts])
    enable(model, RRConfig(head_weights=weights))

Harm is how far the model's predictions move: the KL divergence, which for a small error of a head's output is half the
mean square of the error times the gradient of a prediction's log-likelihood, where predictions are drawn as the model
makes them (its Fisher information). One backward pass tells it for all heads of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrattention.api import attend, estimate, select
from rrattention.config import RRConfig
from rrattention.dense import dense_attention
from rrattention.transformers import attending_fully, observe

__all__ = ["calibrate"]

WHOLE = "full_attention"  # what transformers calls layers that see everything: those with windows are never sparse
POWER = 0.25  # of a harm; README.md has others
RANGE = 1000.0  # how far a harm may be from the median one: what is farther was seen too seldom


def calibrate(
    model: PreTrainedModel,
    readings: Iterable[Callable[[], Tensor]],
    config: RRConfig | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
) -> tuple[tuple[float, ...], ...]:
    """Return `RRConfig.head_weights` for `model`: the weight of each query head of each layer, 1 where none is sparse.

    readings: each reads something like what the model is for, without a cache or padding, and returns its logits
        [..., tokens, vocabulary] with their gradients. Sixteen of 2,048 tokens will do.
    config: what leaves out the blocks, by default `RRConfig(tau=0.8)`, which leaves out many. Best is the rule that
        the weights are for, at a tau near those that it is to have: README.md has figures.
    draws: predictions drawn from each reading: for each the gradients are computed once more.

    In a layer, a head's weight is the fourth root of its harm over the squared mass that it leaves out; between layers,
    the fourth root of their harm over the blocks that they save. Their mean is 1. Memory is that of a training step
    with one reading, without gradients of the parameters. ValueError: there is nothing to read, gradients do not flow
    through it, or it is so short that no block is left out.
    """
    config = replace(config or RRConfig(tau=0.8), head_weights=None, min_tokens=0)
    text_config = model.config.get_text_config(decoder=True)
    layers = text_config.num_hidden_layers
    kinds = getattr(text_config, "layer_types", None) or [WHOLE] * layers
    found: dict[int, _Harm] = {}
    generator: torch.Generator | None = None
    with attending_fully(model, config), _frozen(model), torch.enable_grad():
        for read in readings:
            probe = _Probe(config, kinds, found)
            with observe(probe):
                likelihoods = read().float().flatten(0, -2).log_softmax(dim=-1)
            if not probe.calls:
                continue  # too short
            if not likelihoods.requires_grad:
                raise ValueError(
                    "readings must be prefills of this model that gradients flow through, got one that is not"
                )
            generator = generator or torch.Generator(likelihoods.device).manual_seed(seed)
            for draw in range(draws):
                drawn = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
                likelihoods.gather(1, drawn).sum().backward(retain_graph=draw + 1 < draws)
    if not found or any(harm.saved == 0 for harm in found.values()):
        raise ValueError(
            "readings must be prefills of this model, long enough to leave out blocks of "
            f"{config.block_size} tokens, and none was"
        )
    weights = dict(zip(found, _weights(list(found.values())), strict=True))
    alike = (1.0,) * text_config.num_attention_heads
    return tuple(weights.get(layer, alike) for layer in range(layers))


@dataclass(slots=True)
class _Harm:
    """What was found in a layer, summed over what was read."""

    heads: Tensor  # [H], the squares of each head's effect
    left_out: Tensor  # [H], shares of the mass
    layer: float | Tensor = 0.0  # the squares of all heads' effect together
    saved: float | Tensor = 0.0  # shares of the blocks


@dataclass(slots=True)
class _Probe:
    """An observer that attends densely, and learns from the gradients what the sparse output would do instead."""

    config: RRConfig
    kinds: Sequence[str]  # of the layers
    found: dict[int, _Harm]
    calls: int = 0  # that it attended in

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
        if self.kinds[layer] != WHOLE or query.shape[2] != key.shape[2] or query.shape[2] <= self.config.block_size:
            return None
        self.calls += 1
        out = dense_attention(query, key, value, scale=scale)
        with torch.no_grad():
            scores = estimate(query, key, config=self.config, scale=scale)
            selection = select(scores, query.shape[2], key.shape[2], config=self.config)
            error = attend(query, key, value, selection, scale=scale, skipped=self.config.skipped) - out
            share = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
            none = scores.new_zeros(scores.shape[1])
            harm = self.found.setdefault(layer, _Harm(none, none))
            harm.left_out = harm.left_out + (share * ~selection.mask()).sum(dim=-1).mean(dim=(0, 2))
            harm.saved = harm.saved + 1 - selection.density()

        def learn(gradient: Tensor) -> None:
            effect = (gradient.float() * error.float()).sum(dim=(0, 2, 3))
            harm.heads = harm.heads + effect.square()
            harm.layer = harm.layer + effect.sum().square()

        if not out.requires_grad:  # the first layer's: nothing before it has gradients
            out.requires_grad_()
        out.register_hook(learn)
        return out


def _weights(harms: list[_Harm]) -> tuple[tuple[float, ...], ...]:
    within = torch.stack([_of_harms(harm.heads / harm.left_out.clamp(min=1e-6).square()) for harm in harms])
    across = _of_harms(torch.tensor([float(harm.layer / harm.saved) for harm in harms]))
    weights = across[:, None] * within / within.mean(dim=1, keepdim=True)
    return tuple(tuple(float(f"{weight:.3g}") for weight in row) for row in (weights / weights.mean()).tolist())


def _of_harms(harms: Tensor) -> Tensor:
    """Weights that are 1 for the median; a layer whose output nobody reads has no harm at all."""
    harms = harms.double().cpu()
    median = harms.median().clamp(min=torch.finfo(harms.dtype).tiny)
    return (harms / median).clamp(1 / RANGE, RANGE) ** POWER


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters want no gradients inside the `with`: those would take as much memory as the model."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
