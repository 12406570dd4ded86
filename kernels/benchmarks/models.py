"""Real models for the benchmarks: what reaches their attention, and what they lose when it is replaced.

A `Task` is a loaded checkpoint with something to read: excerpts of texts, of which it predicts the second half token by
token; or videos, of which it is asked questions with known answers. Its attention can be replaced by any function.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from inputs import Inputs
from torch import Tensor
from torch.nn.functional import cross_entropy

from rrattention import dense_attention

if TYPE_CHECKING:
    from rrvideo import VideoQA
    from rrvideo.video import SamplePlan

ATTENTION = "rrattention-benchmark"  # the name under which a function is put into a model
FRAMES = 32  # of a video that are encoded at a time
QUESTIONS = 12  # about each video of the embedded model's world
DESCRIBE = "Describe the video."

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
Reading = Callable[[], tuple[Tensor, Tensor]]  # logits [tokens, vocabulary], and which tokens were right


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its readings, each of which prefills one excerpt or video and predicts what comes of it.

    Gradients flow through a reading, where they are not switched off.
    """

    name: str
    model: Any
    readings: Sequence[Reading]

    @torch.no_grad()
    def loss(self) -> float:
        """Read everything; returns nats a token, the mean over what the model should have said."""
        predicted = (read() for read in self.readings)
        losses = [cross_entropy(logits.float(), right, reduction="none") for logits, right in predicted]
        return float(torch.cat(losses).mean())

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Let the text part of a Hugging Face model attend with `attend(layer, q, k, v, scale) -> [B, H, Lq, D]`.

    For batches without padding: every call is causal, with the last query on the last key.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return attend(module.layer_idx, q, k, v, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda **_: None)
    config = model.config.get_text_config(decoder=True)
    text = next(part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config)
    before = config._attn_implementation
    text.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        text.set_attn_implementation(before)


def capture(task: Task, layers: Sequence[int] = ()) -> list[Inputs]:
    """Return what reaches attention in the task's prefills, in `layers` or in all, while the model attends densely."""
    wanted = set(layers) or set(range(task.layers))
    kept: list[Inputs] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in wanted and q.shape[2] == k.shape[2]:
            kept.append(Inputs(f"{task.name}, layer {layer}", q.clone(), k.clone(), v.clone(), scale, layer))
        return dense_attention(q, k, v, scale=scale)

    with attending(task.model, attend):
        task.loss()
    return kept


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add the options that `load_task` reads."""
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face checkpoint, or 'tiny', the embedded model")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="what the model reads")
    parser.add_argument("--excerpts", type=int, default=1, help="that are taken of what is read, spread evenly")
    from rrvideo.cli import video_path

    parser.add_argument("--video", type=video_path, metavar="FILE", help="what a Qwen2-VL model watches, or 'sample'")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second of --video (default: 1)")
    parser.add_argument("--video-seconds", type=float, help="that an excerpt of --video lasts (default: all of it)")
    parser.add_argument(
        "--ask",
        nargs=2,
        action="append",
        metavar=("QUESTION", "ANSWER"),
        help="about --video (default: a description, where the answer is what the model says with dense attention)",
    )
    parser.add_argument("--world", type=int, default=1, metavar="VIDEOS", help="with neither: videos of our own world")
    parser.add_argument("--world-seconds", type=float, default=300, help="the length of each (default: 300)")
    parser.add_argument("--device", type=torch.device, help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: by device")


def load_task(arguments: Namespace, dtype: torch.dtype, tokens: int | None = None) -> Task:
    """Load `--model` with what it is to read: `tokens` tokens of each `--text`, `--video`, or videos of our world.

    Videos need one of the families of models that rrvideo knows. What cannot be read ends the program with a line.
    """
    from rrvideo.compat import mend_torchvision
    from rrvideo.errors import RRVideoError

    mend_torchvision()
    path = arguments.model
    if path == "tiny":
        from rrvideo.pipeline import EMBEDDED

        path = EMBEDDED["tiny"]
    try:
        if arguments.text is not None:
            return _text_task(path, arguments, dtype, tokens)
        return _video_task(path, arguments, dtype)
    except (OSError, UnicodeDecodeError, RRVideoError) as error:  # of the user's files
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _text_task(path: str | Path, arguments: Namespace, dtype: torch.dtype, tokens: int | None) -> Task:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=dtype)
    model = model.to(arguments.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    excerpts: list[Tensor] = []
    for text in arguments.text:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0].to(arguments.device)
        length, count = min(tokens or len(ids), len(ids)), arguments.excerpts
        starts = [(len(ids) - length) * number // max(1, count - 1) for number in range(count)]
        excerpts += [ids[None, start : start + length] for start in starts]

    def read(excerpt: Tensor) -> tuple[Tensor, Tensor]:
        half = excerpt.shape[1] // 2
        logits = model(input_ids=excerpt, use_cache=False, logits_to_keep=excerpt.shape[1] - half).logits
        return logits[0, :-1], excerpt[0, half + 1 :]

    lengths = sorted(excerpt.shape[1] for excerpt in excerpts)
    shown = f"{lengths[-1]} tokens" if len(excerpts) == 1 else f"{len(excerpts)} excerpts of {lengths[-1]} tokens"
    names = ", ".join(text.name for text in arguments.text)
    return Task(f"{Path(arguments.model).name} on {names}, {shown}", model, [partial(read, each) for each in excerpts])


def _video_task(path: str | Path, arguments: Namespace, dtype: torch.dtype) -> Task:
    from rrvideo import VideoQA

    qa = VideoQA.load(path, attention="full", device=arguments.device, dtype=dtype)
    if arguments.video is not None:
        watched = [_watch_excerpt(qa, arguments, *times) for times in _excerpts(arguments)]
        shown = arguments.video.name + (f", {len(watched)} excerpts" if len(watched) > 1 else "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{seed}.mp4" for seed in range(arguments.world)]
            watched = [_watch_world(qa, seed, arguments.world_seconds, path) for seed, path in enumerate(paths)]
        shown = f"{arguments.world} videos of our world"
    sizes = sorted(video.embeddings.shape[1] for video in watched)
    name = f"{Path(arguments.model).name} on {shown}, {sizes[0]} to {sizes[-1]} tokens"
    return Task(name, qa.checkpoint.model, [video.read for video in watched])


def _excerpts(arguments: Namespace) -> list[tuple[float, float | None]]:
    """Where the excerpts of the video begin and end, in seconds: spread evenly, or all of it."""
    from rrvideo.video import probe

    seconds, duration = arguments.video_seconds, probe(arguments.video).duration
    if seconds is None or seconds >= duration:
        return [(0.0, None)]
    count = arguments.excerpts
    starts = [(duration - seconds) * number / max(1, count - 1) for number in range(count)]
    return [(start, start + seconds) for start in starts]


def _watch_excerpt(qa: VideoQA, arguments: Namespace, start: float, end: float | None) -> _Watched:
    """Watch a part of the video, and ask what was given, or for what the model itself says of it."""
    from rrvideo.video import plan_samples

    clip = {"fps": arguments.fps, "start": start, "end": end}
    asked = arguments.ask
    if asked is None:
        with qa.watch(arguments.video, **clip) as video:
            asked = [(DESCRIBE, video.ask(DESCRIBE, max_new_tokens=64).text)]
    plan = plan_samples(arguments.video, **clip, limits=qa.checkpoint.limits)
    return _Watched.of(qa.checkpoint, plan, lambda _: asked)


def _watch_world(qa: VideoQA, seed: int, seconds: float, path: Path) -> _Watched:
    """Write a video of the embedded model's world to `path`, and ask what can be asked of it."""
    from rrvideo.tiny.drawing import write_video
    from rrvideo.tiny.world import MAX_SCENES, draw_world, questions
    from rrvideo.video import plan_samples

    random = Random(f"quality {seed}")
    world = draw_world(random, seconds, max(1, min(MAX_SCENES, int(seconds / 8))))
    write_video(world, path, width=192, height=144, fps=2)

    def ask(times: Sequence[float]) -> list[tuple[str, str]]:
        possible = questions(world, random, times)
        chosen = random.sample(possible, min(QUESTIONS, len(possible)))
        return [(question.text, question.answer) for question in chosen]

    return _Watched.of(qa.checkpoint, plan_samples(path, limits=qa.checkpoint.limits), ask)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A video as embeddings [1, tokens, hidden], ready to be prefilled again and again, and what is asked of it."""

    checkpoint: Any
    prefix: Any
    embeddings: Tensor
    asked: list[tuple[Tensor, Tensor]]  # token ids of each question and of its answer

    @classmethod
    def of(
        cls, checkpoint: Any, plan: SamplePlan, ask: Callable[[Sequence[float]], Sequence[tuple[str, str]]]
    ) -> _Watched:
        import numpy as np

        from rrvideo.tokens import patchify
        from rrvideo.video import read_frames

        frames, times, features = iter(read_frames(plan)), [], []
        while chunk := list(islice(frames, FRAMES)):
            times += [frame.time for frame in chunk]
            pixels = np.stack([frame.image for frame in chunk])
            patches = patchify(torch.from_numpy(pixels).to(checkpoint.device), checkpoint.spec)
            features.append(checkpoint.encode(patches, torch.tensor([checkpoint.spec.grid(*pixels.shape[:3])])))
        prefix = checkpoint.prefix(times, (plan.height, plan.width))
        embeddings = checkpoint.embed(prefix.input_ids)
        embeddings[prefix.visual] = torch.cat(features)
        tokenizer, asked = checkpoint.tokenizer, []
        for question, answer in ask(times):
            ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
            asked.append((checkpoint.question(prefix, [question]), torch.tensor(ids)))
        return cls(checkpoint, prefix, embeddings[None], asked)

    def read(self) -> tuple[Tensor, Tensor]:
        """Prefill the video, and predict the tokens of the answers."""
        checkpoint, cache = self.checkpoint, self.checkpoint.new_cache()
        forward = partial(unwrap(type(checkpoint).forward), checkpoint)  # which is for inference: without its no_grad
        forward(self.embeddings, self.prefix.positions[:, None], cache)
        predicted = []
        for question, answer in self.asked:
            ids = torch.cat([question, answer[:-1]])
            positions = self.prefix.next_positions(len(ids))[:, None]
            logits = forward(checkpoint.embed(ids)[None], positions, cache, last_only=False)
            cache.crop(-len(ids))
            predicted.append(logits[0, -len(answer) :])
        right = torch.cat([answer for _, answer in self.asked])
        return torch.cat(predicted), right.to(self.embeddings.device)
