"""Train the embedded model: `python -m rrvideo.tiny.train --out FOLDER --minutes 20`.

The architecture is transformers' own Qwen2-VL, small. Three things make it learn in minutes (the first two were
found to decide everything): a curriculum from one temporal step to hundreds; many questions for one video that cannot
see each other; and frames drawn on the training device, so that no two steps ever see the same video.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Value
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..tokens import PatchSpec, Prefix, build_prefix, build_question, patchify
from ..vision import use_segment_attention
from .layout import make_tokenizer, save_layout
from .world import KINDS, MAX_SCENES, Question, World, draw_world, multiple_choice, parameters, questions, render

SPEC = PatchSpec()
MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 112  # of one frame: real videos are brought to these sizes
SIZES = ((56, 56), (84, 84), (56, 84), (84, 56), (56, 112), (112, 56), (84, 112), (112, 84))
QUESTIONS = 8  # for each video of a batch
CHOICE_KINDS = tuple(kind for kind in KINDS if kind not in {"presence", "describe"})
STEP_EDGES = (1, 3, 6, 12, 24, 48, 96, 192, 384)
SCORES = (*KINDS, *(f"choice {kind}" for kind in CHOICE_KINDS), *(f"T<={edge}" for edge in STEP_EDGES))


@dataclass(frozen=True, slots=True)
class Level:
    """A stage of the curriculum: how many temporal steps, and the running loss and the time that let it in."""

    shortest: int
    longest: int
    loss: float
    latest: float  # share of the whole training time


LEVELS = (
    Level(1, 1, math.inf, 0.0),
    Level(1, 3, 0.35, 0.06),
    Level(2, 6, 0.30, 0.12),
    Level(3, 12, 0.25, 0.20),
    Level(4, 48, 0.20, 0.30),
    Level(8, 150, 0.15, 0.40),
    Level(16, 330, 0.12, 0.50),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Videos of one geometry, so that they share the tokens of the prefix, with their questions."""

    frames: torch.Tensor  # [videos, frames, 10] float32: parameters to render
    size: tuple[int, int]  # height, width
    prefix: Prefix
    ids: torch.Tensor  # [videos, questions, tokens] int64: question, answer, padding
    kinds: torch.Tensor  # [videos, questions] int64: rows of SCORES
    before: torch.Tensor  # [answer tokens] int64: the token before each, counted through all of `ids`
    answers: torch.Tensor  # [answer tokens] int64


class Batches(IterableDataset):  # type: ignore[type-arg]
    """An endless stream of batches at the level that `level` holds, easier ones among them."""

    def __init__(self, tokenizer: Any, level: Any, seed: int, tokens: int) -> None:
        self.tokenizer, self.level, self.seed, self.tokens = tokenizer, level, seed, tokens
        self.tokenised: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = Random(f"{self.seed} {worker.id if worker else 0} {time.time_ns()}")
        while True:
            top = self.level.value
            yield self.draw(rng, top if rng.random() < 0.6 else rng.randint(min(2, top), top))

    def draw(self, rng: Random, level: int) -> Batch:
        """Draw one batch: first what all its videos share, then each video."""
        low, high = LEVELS[level].shortest, LEVELS[level].longest
        steps = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        fps = rng.choice((0.5, 1.0, 1.0, 1.0, 2.0, 4.0))
        duration = 2 * steps / fps
        begin = rng.choice((0.0, 0.0, 0.0, rng.uniform(0, 900)))
        # As sampling does it: spread evenly from the first to the last frame of a 25 fps file.
        moments = torch.linspace(begin, begin + duration - 0.04, 2 * steps, dtype=torch.float64).tolist()
        size = rng.choice(SIZES)
        timestamps = rng.random() < 0.85
        prefix = build_prefix(self.tokenizer, SPEC, moments, size, timestamps=timestamps)
        choice = level >= 1 and rng.random() < 0.3
        kinds = CHOICE_KINDS if choice else tuple(KINDS)
        if not timestamps:
            kinds = tuple(kind for kind in kinds if kind != "when")

        videos = max(4, min(256, self.tokens // (len(prefix) + QUESTIONS * (90 if choice else 45))))
        frames, rows, scores = [], [], []
        for _ in range(videos):
            most = min(MAX_SCENES, max(1, steps // 2))
            shortest = min(duration, 4 / fps)
            world = draw_world(rng, duration, rng.randint(1, most), shortest=shortest, begin=begin)
            frames.append(torch.from_numpy(parameters(world, moments)))
            for question in self.ask(rng, world, moments, kinds):
                form = multiple_choice(question, world, rng, moments) if choice else question
                rows.append(self.tokenise(prefix, form))
                scores.append(SCORES.index(f"choice {question.kind}" if choice else question.kind))

        length = max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.zeros(videos * QUESTIONS, length, dtype=torch.long)
        before: list[int] = []
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            before += range(row * length + len(asked) - 1, row * length + len(asked) + len(answer) - 1)
        where = torch.tensor(before)
        return Batch(
            frames=torch.stack(frames),
            size=size,
            prefix=prefix,
            ids=ids.view(videos, QUESTIONS, length),
            kinds=torch.tensor(scores).view(videos, QUESTIONS),
            before=where,
            answers=ids.view(-1)[where + 1],
        )

    @staticmethod
    def ask(rng: Random, world: World, moments: list[float], kinds: tuple[str, ...]) -> Iterator[Question]:
        """Questions about one video, each kind as likely as another."""
        asked = 0
        while asked < QUESTIONS:
            if possible := questions(world, rng, moments, [rng.choice(kinds)]):
                yield rng.choice(possible)
                asked += 1

    def tokenise(self, prefix: Prefix, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of a question and of its answer, the end of the turn included."""
        known = self.tokenised.get((question.text, question.answer))
        if known is None:
            asked = build_question(self.tokenizer, prefix, [question.text]).tolist()
            answer = self.tokenizer.encode(question.answer, add_special_tokens=False)
            known = asked, [*answer, self.tokenizer.eos_token_id]
            if len(self.tokenised) < 50_000:
                self.tokenised[question.text, question.answer] = known
        return known


def corpus() -> Iterator[str]:
    """What the tokenizer is trained on: the world's questions and answers, and times."""
    rng = Random("corpus")
    yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for _ in range(400):
        moments = [float(n) for n in range(40)]
        world = draw_world(rng, 40, rng.randint(1, MAX_SCENES))
        for question in questions(world, rng, moments):
            yield f"{question.text}\n{question.answer}"
            if question.kind in CHOICE_KINDS:
                yield multiple_choice(question, world, rng, moments).text


def build_model(tokenizer: Any) -> Any:
    """A Qwen2-VL with random weights, about 6 million of them, for this tokenizer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = dict(zip(("image", "video", "vision_start", "vision_end"), tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]), strict=True))  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 256},
        tie_word_embeddings=True,
        **{f"{name}_token_id": token for name, token in ids.items()},
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    use_segment_attention(model)
    return model


def degrade(pixels: torch.Tensor, rng: Random) -> torch.Tensor:
    """What cameras and codecs do, on float RGB [videos, frames, height, width, 3] in 0..255; returns uint8."""
    videos = len(pixels)
    contrast = 1 + 0.06 * torch.randn(videos, 1, 1, 1, 1, device=pixels.device)
    brightness = 6 * torch.randn(videos, 1, 1, 1, 3, device=pixels.device)
    pixels = (pixels - 128) * contrast + 128 + brightness
    if rng.random() < 0.5:  # colour at half the resolution of brightness, as 4:2:0 stores it
        luma = pixels.mean(-1, keepdim=True)
        chroma = (pixels - luma).flatten(0, 1).permute(0, 3, 1, 2)
        chroma = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2, mode="bilinear")
        pixels = luma + chroma.permute(0, 2, 3, 1).view_as(pixels)
    pixels = pixels + rng.uniform(0, 6) * torch.randn_like(pixels)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def answer_logits(model: Any, batch: Batch, device: torch.device, rng: Random) -> torch.Tensor:
    """Run the videos once and all their questions over them: logits [answer tokens, vocabulary]."""
    from transformers import DynamicCache

    videos, asked, length = batch.ids.shape
    prefix, size = batch.prefix, batch.size
    frames = batch.frames.to(device, non_blocking=True)
    pixels = degrade(render(frames, *size, softness=rng.uniform(0.8, 2.5), stretch=rng.uniform(0.8, 1.25)), rng)
    pixels = pixels.flatten(0, 1)
    # The vision tower looks at temporal steps one by one, so that all videos can pass as one long one.
    grid = torch.tensor([SPEC.grid(len(pixels), *size)], device=device)
    features = model.model.visual(patchify(pixels, SPEC), grid_thw=grid).pooler_output.float()

    embed = model.get_input_embeddings()
    text = embed(prefix.input_ids.to(device)).expand(videos, -1, -1)
    embeds = text.masked_scatter(prefix.visual.to(device)[None, :, None], features)
    cache = DynamicCache(config=model.config.text_config)
    positions = prefix.positions[:, None].to(device)
    model.model.language_model(
        inputs_embeds=embeds, position_ids=positions.expand(-1, videos, -1), past_key_values=cache, use_cache=True
    )

    # The questions stand side by side; each sees the video and itself, at the positions it has at inference.
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = F.pad(torch.block_diag(*[own] * asked).bool(), (len(prefix), 0), value=True)
    after = prefix.next_positions(length).repeat(1, asked)[:, None].to(device)
    hidden = model.model.language_model(
        inputs_embeds=embed(batch.ids.to(device, non_blocking=True).flatten(1)),
        attention_mask=mask.expand(videos, 1, -1, -1),
        position_ids=after.expand(-1, videos, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.before.to(device)])


def exact(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Which answers greedy decoding would give token for token: [videos * questions] float, 1 or 0."""
    wrong = (logits.argmax(-1) != batch.answers.to(logits.device)).float()
    question = (batch.before // batch.ids.shape[2]).to(logits.device)
    return 1 - torch.zeros(batch.kinds.numel(), device=logits.device).scatter_reduce(0, question, wrong, "amax")


def learning_rate(share: float, step: int, peak: float) -> float:
    """Warm up over 200 steps, hold, and fall to nothing over the last 45 % of the time."""
    return peak * min(1.0, (step + 1) / 200, max(0.0, (1 - share) / 0.45))


def train(args: argparse.Namespace) -> None:
    """Train for `args.minutes` in all, over as many runs as it takes: each goes on where the last one stopped."""
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "training.pt"
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(corpus(), 1024)
    model = build_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
    )
    level, spent, step, running = Value("i", 0), 0.0, 0, 5.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        level.value, spent, step, running = state["level"], state["spent"], state["step"], state["running"]

    batches = Batches(tokenizer, level, args.seed, args.tokens)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=2))
    rng = Random()
    scores = torch.zeros(2, len(SCORES), device=device)  # right answers, questions
    total, stop = args.minutes * 60, args.stop_after * 60
    start = time.monotonic()
    spent_before, reported, saved = spent, start, start
    while spent < total and time.monotonic() - start < stop:
        batch = next(loader)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spent / total, step, args.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = answer_logits(model, batch, device, rng)
        loss = F.cross_entropy(logits.float(), batch.answers.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1

        right = exact(logits, batch)
        steps = batch.frames.shape[1] // 2
        bucket = SCORES.index(f"T<={next(edge for edge in STEP_EDGES if steps <= edge)}")
        for rows in (batch.kinds.flatten().to(device), torch.full_like(batch.kinds.flatten(), bucket).to(device)):
            scores.index_add_(1, rows, torch.stack([right, torch.ones_like(right)]))
        spent = spent_before + time.monotonic() - start
        if step % 20 == 0:
            running += 0.3 * (loss.item() - running)
            following = LEVELS[min(level.value + 1, len(LEVELS) - 1)]
            if level.value + 1 < len(LEVELS) and (running < following.loss or spent / total > following.latest):
                level.value += 1
                running += 0.3  # the new level has to show that it is learned
        now = time.monotonic()
        if now - reported > args.report:
            shown = {k: round(r / n, 3) for k, (r, n) in zip(SCORES, scores.T.tolist(), strict=True) if n}
            print(f"{spent:6.0f} s  step {step}  level {level.value}  loss {running:.3f}  "
                  f"lr {optimizer.param_groups[0]['lr']:.1e}  {json.dumps(shown)}", flush=True)  # fmt: skip
            scores.zero_()
            reported = now
        if now - saved > 120:
            save(args.out, model, tokenizer, optimizer, level.value, spent, step, running)
            saved = now
    save(args.out, model, tokenizer, optimizer, level.value, spent, step, running)


def save(
    out: Path, model: Any, tokenizer: Any, optimizer: Any, level: int, spent: float, step: int, running: float
) -> None:
    """Write the checkpoint in Hugging Face's layout to `out/checkpoint`, and what a later run needs beside it."""
    folder = out / "checkpoint"
    save_layout(folder, tokenizer, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    halved = {name: tensor.detach().half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=halved)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = out / "training.pt.partial"
    torch.save({**state, "level": level, "spent": spent, "step": step, "running": running}, partial)
    partial.replace(out / "training.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the training state")
    parser.add_argument("--minutes", type=float, default=20, help="training time in all, over all runs")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="end this run after so many minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw worlds")
    parser.add_argument("--tokens", type=int, default=120_000, help="tokens of a batch")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=float, default=20, help="seconds between two lines of the log")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
