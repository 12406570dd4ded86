"""Train the embedded model: `python -m rrvideo.tiny.train --out FOLDER --minutes 20`.

The architecture is transformers' own Qwen2-VL, small. Five things make it learn in minutes on one GPU: the vision
tower first learns to see, with linear heads on its features (through the language model alone, shapes took it
thousands of steps); then a curriculum leads from one temporal step to hundreds; one video serves many questions, which
cannot see each other; frames are drawn on the training device, so that no two steps see the same video; and batches
come in few geometries, each of which is captured once as a CUDA graph (a step this small is all launches: seven a
second without).
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
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..tokens import PatchSpec, Prefix, build_prefix, build_question, patchify
from ..vision import use_segment_attention
from .layout import make_tokenizer, save_layout
from .world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MAX_SCENES,
    SHAPES,
    Question,
    World,
    draw_world,
    multiple_choice,
    parameters,
    questions,
    render,
)

SPEC = PatchSpec()
MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 112  # of one frame: real videos are brought to these sizes
SIZES = ((56, 56), (84, 84), (56, 112), (84, 112), (84, 56), (112, 84), (56, 84), (112, 56))
STEPS = (1, 2, 4, 6, 10, 16, 28, 48, 90, 150, 300)  # temporal steps of a video
QUESTIONS = 8  # for each video of a batch
OPEN_LENGTH, CHOICE_LENGTH = 56, 104  # tokens of a question with its answer, padded
ANSWER_LENGTH = 12  # tokens of an answer on average, at most; a description is long, the seven others are shorter
IGNORED = -100  # what cross_entropy skips
CHOICE_KINDS = tuple(kind for kind in KINDS if kind not in {"presence", "describe", "each"})
SCORES = (*KINDS, "letter", *(f"choice {kind}" for kind in CHOICE_KINDS), *(f"T={steps}" for steps in STEPS))


@dataclass(frozen=True, slots=True)
class Level:
    """A stage of the curriculum: how many temporal steps, and the running loss and the time that let it in."""

    steps: tuple[int, ...]
    loss: float
    latest: float  # share of the whole training time


LEVELS = (
    Level((1, 2), math.inf, 0.0),
    Level((2, 4, 6), 0.30, 0.03),
    Level((4, 6, 10), 0.20, 0.20),
    Level((6, 10, 16, 28), 0.15, 0.40),
    Level((10, 16, 28, 48), 0.10, 0.55),
    Level((16, 28, 48, 90, 150, 300), 0.06, 0.72),
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the videos of a batch share: with it, all their tensors have the same sizes and all tokens their places."""

    steps: int
    size: tuple[int, int]  # height, width
    timestamps: bool
    late: bool  # past 10 minutes, where times have a digit more
    choice: bool

    def videos(self, prefix_length: int, tokens: int) -> int:
        """How many videos make a batch of about that many tokens."""
        return max(4, min(256, tokens // (prefix_length + QUESTIONS * self.length)))

    @property
    def length(self) -> int:
        return CHOICE_LENGTH if self.choice else OPEN_LENGTH

    @staticmethod
    def draw(rng: Random, steps: int) -> Geometry:
        """One of five for each number of steps: few, because each costs a CUDA graph."""
        variant = rng.choice((0, 0, 1, 2, 3, 3, 4))
        size = SIZES[(3 * STEPS.index(steps) + variant) % len(SIZES)]
        return Geometry(steps, size, timestamps=variant != 2, late=variant in {1, 4}, choice=variant >= 3)


class Batch(NamedTuple):
    """Videos of one geometry with their questions."""

    frames: torch.Tensor  # [videos, frames, 10] float32: parameters to render
    style: torch.Tensor  # [4] float32: how to draw them, see `draw` and `degrade`
    prefix_ids: torch.Tensor  # [prefix tokens] int64
    ids: torch.Tensor  # [videos, questions, tokens] int64: question, answer, padding
    kinds: torch.Tensor  # [videos * questions] int64: rows of SCORES
    before: torch.Tensor  # [answer tokens] int64: the token before each, counted through all of `ids`
    answers: torch.Tensor  # [answer tokens] int64, padded with IGNORED


class Batches(IterableDataset):  # type: ignore[type-arg]
    """An endless stream of batches at the level that `level` holds, easier ones among them."""

    def __init__(self, tokenizer: Any, level: Any, seed: str, tokens: int, fixed: bool) -> None:
        self.tokenizer, self.level, self.seed, self.tokens = tokenizer, level, seed, tokens
        self.fixed = fixed  # whether questions are padded to the geometry's length, as CUDA graphs need it
        self.tokenised: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def __iter__(self) -> Iterator[tuple[Geometry, Batch]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            top = self.level.value
            level = top if rng.random() < 0.7 else rng.randint(min(1, top), top)
            geometry = Geometry.draw(rng, rng.choice(LEVELS[level].steps))
            yield geometry, self.draw(rng, geometry)

    def draw(self, rng: Random, geometry: Geometry) -> Batch:
        """Draw one batch: first what all its videos share, then each video."""
        choice, longest = geometry.choice, 3540 if geometry.late else 600
        fps = rng.choice([fps for fps in (0.5, 1.0, 1.0, 1.0, 2.0, 4.0) if 2 * geometry.steps / fps <= 600])
        duration = 2 * geometry.steps / fps
        begin = rng.uniform(600, longest - duration) if geometry.late else rng.choice((0, 0, longest - duration))
        begin = begin if geometry.late else rng.random() * begin
        prefix, moments = example(self.tokenizer, geometry, begin, duration)
        kinds = tuple(kind for kind in (CHOICE_KINDS if choice else KINDS) if geometry.timestamps or kind != "when")
        if not self.fixed and rng.random() < 0.6:  # without the long answers, to which the others would be padded
            kinds = tuple(kind for kind in kinds if kind in CHOICE_KINDS or kind == "presence")

        videos = geometry.videos(len(prefix), self.tokens)
        frames, rows, scores = [], [], []
        for _ in range(videos):
            most = min(MAX_SCENES, max(1, geometry.steps // 2))
            shortest = min(duration, 4 / fps)
            world = draw_world(rng, duration, rng.randint(1, most), shortest=shortest, begin=begin)
            frames.append(torch.from_numpy(parameters(world, moments)))
            for question in self.ask(rng, world, moments, kinds):
                kind = f"choice {question.kind}" if choice else question.kind
                if choice:
                    question = multiple_choice(question, world, rng, moments)  # noqa: PLW2901
                    if rng.random() < 0.25:
                        question, kind = letters(question, rng), "letter"  # noqa: PLW2901
                rows.append(self.tokenise(prefix, question))
                scores.append(SCORES.index(kind))

        length = geometry.length if self.fixed else max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        before: list[int] = []
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            before += range(row * length + len(asked) - 1, row * length + len(asked) + len(answer) - 1)
        padding = max(0, len(rows) * ANSWER_LENGTH - len(before))
        where = torch.tensor(before + [0] * padding)
        answers = ids.view(-1)[where + 1]
        answers[len(before) :] = IGNORED
        style = torch.tensor([rng.uniform(0.8, 2.5), rng.uniform(0.8, 1.25), rng.uniform(0, 6), rng.randint(0, 1)])
        return Batch(
            frames=torch.stack(frames),
            style=style,
            prefix_ids=prefix.input_ids,
            ids=ids.view(videos, QUESTIONS, length),
            kinds=torch.tensor(scores),
            before=where,
            answers=answers,
        )

    @staticmethod
    def ask(rng: Random, world: World, moments: list[float], kinds: tuple[str, ...]) -> Iterator[Question]:
        """Questions about one video: its description, which tells most, and then each kind as likely as another."""
        others = [kind for kind in kinds if kind != "describe"]
        wanted = ["describe"] if "describe" in kinds else []
        asked = 0
        while asked < QUESTIONS:
            kind = wanted.pop() if wanted else rng.choice(others)
            if possible := questions(world, rng, moments, [kind]):
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


def letters(question: Question, rng: Random) -> Question:
    """Ask for the letters of a question's four options: a skill of its own, learned sooner without the video."""
    named = [tuple(reversed(option.split(". ", 1))) for option in question.options]
    rng.shuffle(named)
    text = f"Give the letter of each: {', '.join(name for name, _ in named)}.\n" + "\n".join(question.options)
    return Question(question.kind, text, ", ".join(f"{name} {letter}" for name, letter in named))


def example(tokenizer: Any, geometry: Geometry, begin: float, duration: float) -> tuple[Prefix, list[float]]:
    """The prefix of a video from `begin` on, and its frames' times: spread evenly, as sampling a 25 fps file does."""
    moments = torch.linspace(begin, begin + duration - 0.04, 2 * geometry.steps, dtype=torch.float64).tolist()
    return build_prefix(tokenizer, SPEC, moments, geometry.size, timestamps=geometry.timestamps), moments


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
    """A Qwen2-VL with random weights, about 4 million of them, for this tokenizer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = dict(zip(("image", "video", "vision_start", "vision_end"), tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]), strict=True))  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
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
    # With the usual 0.02, attention starts out so even in a model this narrow that no query finds its key for thousands
    # of steps; with 1 / sqrt(hidden) it takes two hundred.
    layers = config.text_config.num_hidden_layers
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weight, std=0.06 / math.sqrt(2 * layers) if into_stream else 0.06)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    use_segment_attention(model)
    return model


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
            group["lr"] = learning_rate(0.6 * step / steps, step, peak)
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


class Places:
    """Where the tokens of a geometry stand, on the device: rotary embeddings, masks and indices."""

    def __init__(self, model: Any, tokenizer: Any, geometry: Geometry, batch: Batch) -> None:
        from transformers.vision_utils import get_vision_position_ids

        videos, asked, length = batch.ids.shape
        device = batch.ids.device
        self.size = geometry.size
        prefix, _ = example(tokenizer, geometry, 600.0 if geometry.late else 0.0, 2.0 * geometry.steps)
        self.visual = prefix.visual.nonzero()[:, 0].to(device)
        language, tower = model.model.language_model, model.model.visual
        anything = torch.zeros(1, device=device)
        after = prefix.next_positions(length).repeat(1, asked)
        self.prefix, self.questions = (
            language.rotary_emb(anything, positions[:, None].to(device)) for positions in (prefix.positions, after)
        )
        # The questions stand side by side; each sees the video and itself, at the positions it has at inference.
        own = torch.ones(length, length, dtype=torch.bool).tril()
        mask = F.pad(torch.block_diag(*[own] * asked).bool(), (len(prefix), 0), value=True)
        self.mask = mask.to(device).expand(videos, 1, -1, -1)
        # The vision tower looks at temporal steps one by one, so that all videos can pass as one long one.
        grid = torch.tensor([SPEC.grid(2 * videos * geometry.steps, *geometry.size)], device=device)
        patches = get_vision_position_ids(grid, SPEC.merge_size, kwargs={})
        self.vision = tower.rotary_pos_emb(anything, patches)
        self.segment = int(grid[0, 1] * grid[0, 2])
        self.segments = torch.arange(videos * geometry.steps + 1, dtype=torch.int32, device=device) * self.segment


def answer_logits(model: Any, places: Places, batch: Batch) -> torch.Tensor:
    """Run the videos once and all their questions over them: logits [answer tokens, vocabulary].

    The layers are transformers' own; what its `forward`s do around them waits for the device.
    """
    from transformers import DynamicCache

    tower, language = model.model.visual, model.model.language_model
    pixels = degrade(draw(batch.frames, places.size, batch.style), batch.style).flatten(0, 1)
    hidden = tower.patch_embed(patchify(pixels, SPEC))
    for block in tower.blocks:
        hidden = block(hidden, cu_seqlens=places.segments, max_seqlen=places.segment, position_embeddings=places.vision)
    features = tower.merger(hidden).float()

    videos = len(batch.ids)
    text = language.embed_tokens(batch.prefix_ids).expand(videos, -1, -1)
    embeds = text.index_copy(1, places.visual, features.view(videos, -1, text.shape[-1]))
    cache = DynamicCache(config=model.config.text_config)
    decode(language, embeds, places.prefix, None, cache)
    hidden = decode(language, language.embed_tokens(batch.ids.flatten(1)), places.questions, places.mask, cache)
    return model.lm_head(hidden.flatten(0, 1)[batch.before])


def decode(language: Any, hidden: torch.Tensor, rotary: Any, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
    """The language model's layers over embeddings [videos, tokens, hidden], after what the cache holds."""
    for layer in language.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    return language.norm(hidden)


def exact(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Which answers greedy decoding would give token for token: [videos * questions] float, 1 or 0."""
    wrong = ((logits.argmax(-1) != batch.answers) & (batch.answers != IGNORED)).float()
    question = batch.before // batch.ids.shape[2]
    return 1 - torch.zeros_like(batch.kinds, dtype=torch.float32).scatter_reduce(0, question, wrong, "amax")


class Trainer:
    """Takes training steps: directly on a CPU, on CUDA by replaying one captured graph per geometry."""

    def __init__(self, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.device = next(model.parameters()).device
        self.scores = torch.zeros(2, len(SCORES), device=self.device)  # right answers, questions
        self.loss = torch.zeros((), device=self.device)
        self.graphs: dict[Geometry, tuple[Any, Batch, Places]] = {}  # a graph reads the other two in place
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def step(self, geometry: Geometry, batch: Batch) -> None:
        """Learn from one batch; `loss` and `scores` hold how it went."""
        if geometry in self.graphs:
            graph, static, _ = self.graphs[geometry]
            for old, new in zip(static, batch, strict=True):
                old.copy_(new)
            graph.replay()
            return
        batch = Batch(*(tensor.to(self.device) for tensor in batch))
        places = Places(self.model, self.tokenizer, geometry, batch)
        if self.device.type != "cuda":
            self.learn(geometry, places, batch)
            return
        side = torch.cuda.Stream()  # as capturing demands: what runs first on a side stream is initialised there
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.learn(geometry, places, batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.learn(geometry, places, batch)
        self.graphs[geometry] = graph, batch, places

    def learn(self, geometry: Geometry, places: Places, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.pool is None):
            logits = answer_logits(self.model, places, batch)
        loss = F.cross_entropy(logits.float(), batch.answers, ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # last: gradients must not outlive the graph that they belong to
        self.loss.copy_(loss.detach())
        right = exact(logits, batch)
        tally = torch.stack([right, torch.ones_like(right)])
        self.scores.index_add_(1, batch.kinds, tally)
        self.scores[:, SCORES.index(f"T={geometry.steps}")] += tally.sum(1)


def learning_rate(share: float, step: int, peak: float) -> float:
    """Warm up over 200 steps, hold, and fall to nothing over the last 45 % of the time."""
    return peak * min(1.0, (step + 1) / 200, max(0.0, (1 - share) / 0.45))


def train(args: argparse.Namespace) -> None:
    """Train for `args.minutes` in all, over as many runs as it takes: each goes on where the last one stopped."""
    from transformers import AutoTokenizer

    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "training.pt"
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else make_tokenizer(corpus(), 1024)
    model = build_model(tokenizer).to(device)
    rng = Random(args.seed)
    level, spent, step, running = Value("i", args.level), 0.0, 0, 5.0
    if args.start:
        model.load_state_dict(type(model).from_pretrained(args.start, dtype=torch.float32).state_dict())
    elif args.vision:
        tower = type(model).from_pretrained(args.vision, dtype=torch.float32).model.visual
        model.model.visual.load_state_dict(tower.state_dict())
    elif not state_file.exists():
        pretrain_vision(model, device, args.vision_steps, args.lr, rng)
    if not args.start and not state_file.exists():
        scale_features(model, rng)
    model.model.visual.requires_grad_(not args.freeze_vision)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(args.lr),
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=on_gpu,
        capturable=on_gpu,
    )
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        level.value, spent, step, running = state["level"], state["spent"], state["step"], state["running"]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(args.lr, device=device)

    batches = Batches(tokenizer, level, f"{args.seed} {step}", args.tokens, fixed=on_gpu)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=2))
    trainer = Trainer(model, tokenizer, optimizer)
    total, stop = args.minutes * 60, args.stop_after * 60
    start = time.monotonic()
    spent_before, reported, saved = spent, start, start
    while spent < total and time.monotonic() - start < stop:
        geometry, batch = next(loader)
        for group in optimizer.param_groups:
            group["lr"].fill_(learning_rate(spent / total, step, args.lr))
        trainer.step(geometry, batch)
        step += 1
        now = time.monotonic()
        spent = spent_before + now - start
        if step % 10 == 0:
            running += 0.1 * (trainer.loss.item() - running)
            following = LEVELS[min(level.value + 1, len(LEVELS) - 1)]
            if level.value + 1 < len(LEVELS) and (running < following.loss or spent / total > following.latest):
                level.value += 1
                running += 0.3  # the new level has to show that it is learned
        if now - reported > args.report:
            right, asked = trainer.scores.tolist()
            shown = {name: round(r / n, 3) for name, r, n in zip(SCORES, right, asked, strict=True) if n}
            trainer.scores.zero_()
            rate = learning_rate(spent / total, step, args.lr)
            print(
                f"{spent:.0f} s  step {step}  level {level.value}  loss {running:.3f}  lr {rate:.1e}  {shown}",
                flush=True,
            )
            reported = now
        if now - saved > 90:
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
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from, instead of from nothing")
    parser.add_argument(
        "--vision", type=Path, help="a checkpoint to take the vision tower from, instead of teaching one"
    )
    parser.add_argument("--freeze-vision", action="store_true", help="leave the vision tower as it is")
    parser.add_argument("--level", type=int, default=0, help="stage of the curriculum to start at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw worlds")
    parser.add_argument("--vision-steps", type=int, default=5000, help="steps of the vision tower alone")
    parser.add_argument("--tokens", type=int, default=64_000, help="tokens of a batch")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=float, default=20, help="seconds between two lines of the log")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
