"""How training videos look, and how the vision tower learns to see them before it works for a language model."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch.nn import functional as F

from ..tokens import patchify
from .batches import SIZES, SPEC
from .world import BACKGROUNDS, COLOURS, MAX_SCENES, SHAPES, draw_world, parameters, render


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


def pretrain_vision(model: Any, device: torch.device, steps: int, peak: float, rng: Random, pairs: int = 256) -> None:
    """Teach the vision tower what each frame of a pair shows, so that linear heads can read it off its features."""
    palette = [torch.tensor(list(colours.values()), dtype=torch.float32) for colours in (COLOURS, BACKGROUNDS)]
    outputs = (len(COLOURS), len(SHAPES), len(BACKGROUNDS), 2)
    head = torch.nn.Linear(model.config.vision_config.hidden_size, 2 * sum(outputs)).to(device)
    tower = model.model.visual
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        shown = torch.stack([torch.randint(n, (pairs, 2)) for n in outputs[:3]], -1)
        place = torch.cat([torch.rand(pairs, 2, 2) * 0.6 + 0.2, torch.rand(pairs, 2, 1) * 0.12 + 0.19], -1)
        same = torch.rand(pairs) < 0.8  # else a cut falls between the two frames
        shown[same, 1] = shown[same, 0]
        moved = place[:, 0] + torch.cat([torch.randn(pairs, 2) * 0.08, torch.zeros(pairs, 1)], -1)
        place[same, 1] = moved[same]
        colour, shape, background = shown.unbind(-1)
        rows = [palette[0][colour], palette[1][background], shape[..., None].float(), place]
        size = rng.choice(SIZES)
        style = torch.tensor([rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.25), rng.uniform(0, 6), rng.randint(0, 1)])
        style = style.to(device)
        pixels = degrade(draw(torch.cat(rows, -1).to(device), size, style), style).flatten(0, 1)
        grid = torch.tensor([SPEC.grid(len(pixels), *size)], device=device)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 200)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = tower(patchify(pixels, SPEC), grid_thw=grid).pooler_output.float()
        seen = head(features.unflatten(0, (pairs, -1)).mean(1)).view(pairs, 2, -1).split(outputs, -1)
        answers = shown.to(device)
        loss = 10 * F.mse_loss(seen[3], place[..., :2].to(device))
        for i in range(3):
            loss = loss + F.cross_entropy(seen[i].flatten(0, 1), answers[..., i].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 10) == steps // 10 - 1:
            right = [round((seen[i].argmax(-1) == answers[..., i]).float().mean().item(), 3) for i in range(3)]
            print(f"vision {step + 1}/{steps}  loss {loss.item():.3f}  colour, shape, background {right}", flush=True)


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
