"""Train the embedded model: `python -m rrvideo.tiny.train --out FOLDER --minutes 20`.

The architecture is transformers' own Qwen2-VL, small. Five things help it to learn on one GPU: the vision tower first
learns to see, in the language model's own words (through the language model alone it had not learned shapes after
2,000 steps); then a curriculum leads from few kinds of questions and two temporal steps to all kinds and hundreds of
steps; one video serves many questions, which cannot see each other; frames are drawn on the training device, so that no
two steps see the same video; and batches come in few geometries, each of which is captured once as a CUDA graph
(without, a step took a tenth of a second or more at any size).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from multiprocessing import Value
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..compat import mend_torchvision
from ..tokens import patchify
from ..vision import use_segment_attention
from .batches import IGNORED, LEVELS, SCORES, SPEC, Batch, Batches, Geometry, corpus, example
from .layout import make_tokenizer, save_layout
from .sight import degrade, draw, pretrain_vision, scale_features

MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 112  # of one frame: real videos are brought to these sizes


def build_model(tokenizer: Any) -> Any:
    """A Qwen2-VL with random weights, about 5 million of them, for this tokenizer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = dict(zip(("image", "video", "vision_start", "vision_end"), tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]), strict=True))  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
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
    # About 1 / sqrt(hidden). In a small probe this, together with `scale_features`, found the scene that a question
    # names within 300 steps, and 0.02 without it did not; which of the two does it was not told apart.
    layers = config.text_config.num_hidden_layers
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(weight, std=0.06 / math.sqrt(2 * layers) if into_stream else 0.06)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    use_segment_attention(model)
    return model


class Places:
    """Where the tokens of a geometry stand, on the device: rotary embeddings, masks and indices."""

    def __init__(self, model: Any, tokenizer: Any, geometry: Geometry, batch: Batch) -> None:
        from transformers.vision_utils import get_vision_position_ids

        videos, asked, length = batch.ids.shape
        device = batch.ids.device
        self.size = geometry.size
        prefix, _ = example(tokenizer, geometry, 600.0 if geometry.late else 0.0, geometry.longest)
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
    mend_torchvision()
    from transformers import AutoTokenizer

    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "training.pt"
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else make_tokenizer(corpus(), 1024)
    model = build_model(tokenizer).to(device)
    rng = Random(args.seed)
    level, spent, step = Value("i", args.level), 0.0, 0
    if args.start:
        model.load_state_dict(type(model).from_pretrained(args.start, dtype=torch.float32).state_dict())
    elif not state_file.exists():
        if args.vision:
            tower = type(model).from_pretrained(args.vision, dtype=torch.float32).model.visual
            model.model.visual.load_state_dict(tower.state_dict())
            scale_features(model, rng)
        pretrain_vision(model, tokenizer, device, args.vision_steps, args.lr, rng)
        scale_features(model, rng)
    model.model.visual.requires_grad_(not args.freeze_vision)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # The first run with graphs died without a word. This is one of the three things that changed before the next.
        torch.backends.cuda.enable_cudnn_sdp(False)
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
        level.value, spent, step = state["level"], state["spent"], state["step"]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(args.lr, device=device)

    batches = Batches(tokenizer, level, f"{args.seed} {step}", args.tokens)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=2))
    trainer = Trainer(model, tokenizer, optimizer)
    total, stop = args.minutes * 60, args.stop_after * 60
    start = time.monotonic()
    spent_before, reported, saved = spent, start, start
    counted, entered = torch.zeros(2, device=device), step  # right answers and questions so far; when the level began
    while spent < total and time.monotonic() - start < stop:
        geometry, batch = next(loader)
        for group in optimizer.param_groups:
            group["lr"].fill_(learning_rate(spent / total, step, args.lr))
        trainer.step(geometry, batch)
        step += 1
        now = time.monotonic()
        spent = spent_before + now - start
        if step % 100 == 0:
            scores = trainer.scores.sum(1)
            right, asked = (scores - counted).tolist()
            counted = scores
            here = LEVELS[level.value]
            if (step - entered > 200 and right > here.passed * asked) or spent / total > here.latest:
                level.value, entered = level.value + 1, step
        if now - reported > args.report:
            right, asked = trainer.scores.tolist()
            shown = {name: round(r / n, 3) for name, r, n in zip(SCORES, right, asked, strict=True) if n}
            trainer.scores.zero_()
            counted = torch.zeros_like(counted)
            rate = learning_rate(spent / total, step, args.lr)
            loss = trainer.loss.item()
            print(
                f"{spent:.0f} s  step {step}  level {level.value}  loss {loss:.3f}  lr {rate:.1e}  {shown}", flush=True
            )
            reported = now
        if now - saved > 90:
            save(args.out, model, tokenizer, optimizer, level.value, spent, step)
            saved = now
    save(args.out, model, tokenizer, optimizer, level.value, spent, step)


def save(out: Path, model: Any, tokenizer: Any, optimizer: Any, level: int, spent: float, step: int) -> None:
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
    torch.save({**state, "level": level, "spent": spent, "step": step}, partial)
    partial.replace(out / "training.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the training state")
    parser.add_argument("--minutes", type=float, default=20, help="training time in all, over all runs")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="end this run after so many minutes")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from, instead of from nothing")
    parser.add_argument(
        "--vision", type=Path, help="a checkpoint whose vision tower is taught on, instead of one with random weights"
    )
    parser.add_argument("--freeze-vision", action="store_true", help="leave the vision tower as it is")
    parser.add_argument("--level", type=int, default=0, help="stage of the curriculum to start at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw worlds")
    parser.add_argument("--vision-steps", type=int, default=3000, help="steps of the vision tower alone")
    parser.add_argument("--tokens", type=int, default=64_000, help="tokens of a batch")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=float, default=20, help="seconds between two lines of the log")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
