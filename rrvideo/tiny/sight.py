"""How training videos look, and how the vision tower learns to see them before it works for a language model."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch.nn import functional as F

from ..tokens import patchify
from .batches import SIZES, SPEC
from .drawing import parameters, render
from .world import BACKGROUNDS, COLOURS, DIRECTIONS, MAX_SCENES, SHAPES, draw_world


def draw(frames: torch.Tensor, size: tuple[int, int], style: torch.Tensor) -> torch.Tensor:
    """Render with edges and proportions as different as files have them: float [..., height, width, 3]."""
    return render(frames, *size, softness=style[0], stretch=style[1])


def degrade(pixels: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """What cameras and codecs do, on float RGB [videos, frames, height, width, 3] in 0..255; returns uint8."""
    videos = len(pixels)
    contrast = 1 + 0.06 * torch.randn(videos, 1, 1, 1, 1, device=pixels.device)
    brightness = 6 * torch.randn(videos, 1, 1, 1, 3, device=pixels.device)
    pixels = (pixels - 128) * contrast + 128 + brightness
    luma = pixels.mean(-1, keepdim=True)
    chroma = pixels - luma
    coarse = F.avg_pool2d(chroma.flatten(0, 1).permute(0, 3, 1, 2), 2)  # as 4:2:0 stores it
    coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1).view_as(pixels)
    pixels = luma + torch.lerp(chroma, coarse, style[3])
    pixels = pixels + style[2] * torch.randn_like(pixels)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def pretrain_vision(model: Any, tokenizer: Any, device: torch.device, steps: int, peak: float, rng: Random) -> None:
    """Teach the vision tower to say what a pair of frames shows, in the language model's own words.

    Every visual token learns to be the sum of the embeddings of the colour, the shape, the background and the
    direction, so that a question that names one of them meets its like.
    """
    tower = model.model.visual
    tables = (list(COLOURS), list(SHAPES), list(BACKGROUNDS), list(DIRECTIONS))
    words = word_embeddings(model, tokenizer, [word for table in tables for word in table])
    optimizer = torch.optim.AdamW(tower.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        frames, targets = (tensor.to(device) for tensor in pairs_of_frames())
        size = rng.choice(SIZES)
        style = torch.tensor([rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.25), rng.uniform(0, 6), rng.randint(0, 1)])
        style = style.to(device)
        pixels = degrade(draw(frames, size, style), style).flatten(0, 1)
        grid = torch.tensor([SPEC.grid(len(pixels), *size)], device=device)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = tower(patchify(pixels, SPEC), grid_thw=grid).pooler_output.float()
        said = (features @ words.T).unflatten(0, (len(frames), -1))  # [pairs, visual tokens, words]
        sizes = [len(table) for table in tables]
        # Nothing but the words: what else the features hold is noise to the attention that looks for a word.
        loss = F.mse_loss(features, (targets @ words).repeat_interleave(said.shape[1], 0)) / words.var()
        for logits, shown in zip(said.split(sizes, -1), targets.split(sizes, -1), strict=True):
            loss = loss - (logits.log_softmax(-1) * shown[:, None]).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 10) == steps // 10 - 1:
            right = []
            for logits, shown in zip(said.mean(1).split(sizes, -1), targets.split(sizes, -1), strict=True):
                told = shown.amax(-1) == 1  # neither two scenes nor motion across a cut
                right.append(round((logits.argmax(-1) == shown.argmax(-1))[told].float().mean().item(), 3))
            print(
                f"vision {step + 1}/{steps}  loss {loss.item():.3f}  colour, shape, background, direction {right}",
                flush=True,
            )


def word_embeddings(model: Any, tokenizer: Any, words: list[str]) -> torch.Tensor:
    """Each word's embedding at the start of a text plus that within one, [words, hidden]."""
    table = model.get_input_embeddings().weight.detach()
    forms = [tokenizer.encode(word, add_special_tokens=False)[:1] for word in words]
    within = [tokenizer.encode(f" {word}", add_special_tokens=False)[:1] for word in words]
    return (table[torch.tensor(forms)] + table[torch.tensor(within)]).squeeze(1)


def pairs_of_frames(pairs: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pairs of frames, [pairs, 2, 10], and the share of each pair that shows each word, [pairs, words].

    One pair in five falls across a cut: half of it shows one scene and half another, and no direction.
    """
    same = torch.rand(pairs) < 0.8
    colour, shape, background, direction = (
        torch.where(same[:, None], first, torch.cat([first, torch.randint(count, (pairs, 1))], 1))
        for count in (len(COLOURS), len(SHAPES), len(BACKGROUNDS), len(DIRECTIONS))
        for first in [torch.randint(count, (pairs, 1))]
    )
    # Between its two frames a shape moves by 2 to 40 % of its path, and starts again when it comes to its end.
    ahead = 0.02 * 20 ** torch.rand(pairs)
    begin = torch.rand(pairs)
    progress = torch.stack([begin, torch.where(same, (begin + ahead) % 1, torch.rand(pairs))], 1) - 0.5
    travel = 0.32 + 0.18 * torch.rand(pairs, 1)
    way = torch.tensor(list(DIRECTIONS.values()))[direction]  # [pairs, 2, right and down]
    middle = 0.42 + 0.16 * torch.rand(pairs, 1, 2)
    place = middle + way * (progress * travel)[..., None]
    radius = (0.2 + 0.1 * torch.rand(pairs, 1, 1)).expand(-1, 2, -1)
    palette = [torch.tensor(list(colours.values()), dtype=torch.float32) for colours in (COLOURS, BACKGROUNDS)]
    frames = [palette[0][colour], palette[1][background], shape[..., None].float(), place, radius]
    shares = [
        F.one_hot(shown, count).float().mean(1)
        for shown, count in ((colour, len(COLOURS)), (shape, len(SHAPES)), (background, len(BACKGROUNDS)))
    ]
    moves = F.one_hot(direction[:, 0], len(DIRECTIONS)) * same[:, None]
    return torch.cat(frames, -1), torch.cat([*shares, moves], -1)


@torch.no_grad()
def scale_features(model: Any, rng: Random) -> None:
    """Bring the vision features to a spread of one half, so that the language model hears them beside its own words."""
    device, tower = next(model.parameters()).device, model.model.visual
    world = draw_world(rng, 64, MAX_SCENES)
    frames = torch.from_numpy(parameters(world, [float(second) for second in range(64)])).to(device)
    pixels = render(frames, 84, 84).round().to(torch.uint8)
    grid = torch.tensor([SPEC.grid(len(pixels), 84, 84)], device=device)
    factor = 0.5 / tower(patchify(pixels, SPEC), grid_thw=grid).pooler_output.std()
    tower.merger.mlp[2].weight.mul_(factor)
    tower.merger.mlp[2].bias.mul_(factor)
