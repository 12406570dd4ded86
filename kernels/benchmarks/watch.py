"""Prefill generated frames with a whole Qwen2-VL of random weights, chunk by chunk, sparse and dense.

    python kernels/benchmarks/watch.py --shape 7b --tokens 131072 --tau .95 .3
    python kernels/benchmarks/watch.py --shape 2b --video FILE --frames 900 --tau .5    how well a file's stages overlap
    python kernels/benchmarks/watch.py --shape 2b --tokens 113400 --answers 1 2 4 8 32    what evidence costs

Everything runs that runs when a video is watched, but for the decoder. Random weights attend to everything alike: tau
is then about the density that they get, and nothing is said of a trained model's. Times are medians over runs by turns,
after one run of each that compiles; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import default_device, finish, machine, synchronize, table

from rrattention import RRConfig

# Sizes of the published checkpoints: of the language model, then of the vision tower.
SHAPES = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1},
}
LAYERS = {"2b": (28, 32), "7b": (28, 32), "tiny": (2, 2)}
SIZE = (280, 504)  # of a frame, height and width: 180 tokens for two frames
COLUMNS = {
    **{"way": "s", "tau": "g", "density": ".3f", "seconds": ".2f", "low": ".2f", "high": ".2f"},
    **{"encode": ".2f", "prefill": ".2f", "prefill speedup": ".2f", "peak GB": ".2f", "KV GB": ".2f"},
}
EVIDENCE_COLUMNS = {
    **{"answer": "d", "seconds": ".4f", "with evidence": ".4f"},
    **{"share": ".1%", "low": ".1%", "high": ".1%"},
}
QUESTION = 30  # tokens


def main() -> int:
    """Parse the shape, run each way by turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--tokens", type=int, nargs="+", help="visual tokens, about; of --video, at most")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.95, 0.3])
    parser.add_argument("--chunk", type=int, help="tokens that are prefilled at a time (default: the engine's choice)")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="watched in place of generated frames, decoder and all"
    )
    parser.add_argument("--frames", type=int, default=768, help="of --video, evenly spread (default: 768)")
    parser.add_argument(
        "--answers",
        type=int,
        nargs="+",
        metavar="N",
        help="time the evidence of answers so long, in tokens",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", type=torch.device, default=default_device())
    arguments = parser.parse_args()
    checkpoint = build_checkpoint(arguments.shape, arguments.device)
    print(machine(arguments.device))
    if arguments.video:
        found = overlap(checkpoint, arguments)
        finish(
            {"benchmark": "watch", "machine": machine(arguments.device), "shape": arguments.shape} | found,
            arguments.json,
        )
        return 0
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens or [32768, 131072]:
        if arguments.answers:
            found = time_evidence(checkpoint, tokens, arguments)
            print(f"{tokens:,} visual tokens, a question of {QUESTION}\n{table(found, EVIDENCE_COLUMNS)}", flush=True)
            rows += [row | {"visual tokens": tokens} for row in found]
            continue
        found = time_watching(checkpoint, tokens, arguments)
        print(f"{found[0]['visual tokens']:,.0f} visual tokens\n{table(found, COLUMNS)}", flush=True)
        rows += found
    finish(
        {"benchmark": "watch", "machine": machine(arguments.device), "shape": arguments.shape, "rows": rows},
        arguments.json,
    )
    return 0


def overlap(checkpoint: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The time to a first answer about a file against the longest of its stages alone, with the first tau."""
    from rrattention.transformers import enable
    from rrvideo import VideoQA
    from rrvideo.bench_engine import first_answer

    enable(checkpoint.model, RRConfig(tau=arguments.tau[0]))
    if arguments.tokens:
        limits = replace(checkpoint.limits, total_pixels=arguments.tokens[0] * checkpoint.limits.factor**2)
        checkpoint = replace(checkpoint, limits=limits)
    sampling = {"fps": 1000.0, "max_frames": arguments.frames, "timestamps": False}
    found = first_answer(VideoQA(checkpoint), arguments.video, sampling, arguments.repeats)
    return found | {
        part: {name: asdict(spread) for name, spread in found[part].items()} for part in ("seconds", "over_longest")
    }


def time_watching(checkpoint: Any, tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for full attention and one for each tau."""
    from rrattention.transformers import enable
    from rrvideo import engine

    stream = Frames(tokens)
    if arguments.chunk:
        vars(engine)["chunk_tokens"] = lambda _: arguments.chunk
    ways: list[tuple[Any, RRConfig]] = [("full", RRConfig()), *(("rr", RRConfig(tau=tau)) for tau in arguments.tau)]
    runs: list[list[dict[str, Any]]] = [[] for _ in ways]
    for _ in range(1 + arguments.repeats):  # the first compiles
        for (attention, config), run in zip(ways, runs, strict=True):
            enable(checkpoint.model, config, attention=attention)
            before = start_of_peak(arguments.device)
            started = time.perf_counter()
            watched = engine.watch(checkpoint, stream, timestamps=False)
            synchronize(arguments.device)
            run.append(
                {
                    "seconds": time.perf_counter() - started,
                    "encode": watched.seconds["encode"],
                    "prefill": watched.seconds["prefill"],
                    "density": float(watched.density),
                    "visual tokens": int(watched.prefix.visual.sum()),
                    "peak GB": peak_since(before, arguments.device),
                    "KV GB": 2e-9 * watched.cache.layers[0].keys.nbytes * len(watched.cache.layers),
                }
            )
            watched.close()
            del watched
    rows = []
    for (attention, config), run in zip(ways, runs, strict=True):
        timed = run[1:]
        row = {key: statistics.median(each[key] for each in timed) for key in timed[0]}
        seconds = [each["seconds"] for each in timed]
        row |= {"way": attention, "tau": config.tau if attention == "rr" else None}
        rows.append(row | {"low": min(seconds), "high": max(seconds), "runs": len(timed)})
    return [row | {"prefill speedup": rows[0]["prefill"] / row["prefill"]} for row in rows]


def time_evidence(checkpoint: Any, tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each length of answer: what share of its time finding its evidence takes."""
    from rrattention.transformers import enable
    from rrvideo import engine
    from rrvideo.evidence import Gaze, intervals

    enable(checkpoint.model, RRConfig(tau=arguments.tau[0]))
    watched = engine.watch(checkpoint, Frames(tokens), timestamps=True)
    ids = torch.randint(300, (QUESTION,), generator=torch.Generator().manual_seed(0))

    def ask(length: int, *, looks: bool) -> float:
        started = time.perf_counter()
        gaze = Gaze(watched.prefix, asked=len(ids), layers=watched.layers) if looks else None
        answer = list(watched.generate(ids, max_new_tokens=length, observer=gaze))
        if gaze:
            intervals(gaze.weights(), watched.prefix.times, watched.prefix.times[-1] + 1)
        synchronize(arguments.device)
        if len(answer) != length:
            raise RuntimeError(f"the answer ended after {len(answer)} tokens")
        return time.perf_counter() - started

    rows = []
    for length in arguments.answers:
        turns = [(ask(length, looks=False), ask(length, looks=True)) for _ in range(2 + arguments.repeats)][2:]
        shares = [1 - without / seconds for without, seconds in turns]
        without, seconds = (statistics.median(column) for column in zip(*turns, strict=True))
        row = {"answer": length, "seconds": without, "with evidence": seconds, "share": statistics.median(shares)}
        rows.append(row | {"low": min(shares), "high": max(shares), "runs": len(turns)})
    watched.close()
    return rows


def build_checkpoint(shape: str, device: torch.device) -> Any:
    """A Qwen2-VL of a published size with random weights in bfloat16, as `rrvideo.model.load` would return it."""
    from rrvideo.compat import mend_torchvision

    mend_torchvision()
    import transformers

    from rrvideo.families import FAMILIES
    from rrvideo.model import Checkpoint
    from rrvideo.pipeline import EMBEDDED
    from rrvideo.tokens import PatchSpec
    from rrvideo.video import PixelLimits
    from rrvideo.vision import use_segment_attention

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    layers, depth = LAYERS[shape]
    text = SHAPES[shape] | {
        "num_hidden_layers": layers,
        "vocab_size": 151936 if shape != "tiny" else len(tokenizer),
        "max_position_embeddings": 1_000_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": depth, "embed_dim": 1280 if shape != "tiny" else 64, "num_heads": 16 if shape != "tiny" else 2}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision | {"hidden_size": SHAPES[shape]["hidden_size"]},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.Qwen2VLForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
    use_segment_attention(model)
    family = FAMILIES["qwen2_vl"]
    return Checkpoint(shape, family, model, tokenizer, PatchSpec(), PixelLimits(), EMBEDDED["tiny"], device)


class Frames:
    """A stream of frames of noise, two a second, that makes about so many visual tokens."""

    def __init__(self, tokens: int) -> None:
        from rrvideo.video import SamplePlan, VideoInfo

        height, width = SIZE
        steps = max(1, round(tokens / (height // 28 * (width // 28))))
        times = tuple(frame / 2 for frame in range(2 * steps))
        info = VideoInfo("generated", "none", "none", width, height, 0, float(steps), 2.0, 2 * steps, 1)
        index: Any = SimpleNamespace(keyframes=np.arange(1), times=np.zeros(1))  # there is no file
        self.plan = SamplePlan(
            info, tuple(range(2 * steps)), times, width, height, "uniform", 2.0, 0.0, float(steps), (), index
        )
        rng = np.random.default_rng(0)
        self._images = rng.integers(0, 256, (8, height, width, 3), dtype=np.uint8)

    def __iter__(self) -> Iterator[Any]:
        from rrvideo.video import Frame

        for number, moment in enumerate(self.plan.times):
            yield Frame(number, moment, self._images[number % len(self._images)])


def start_of_peak(device: torch.device) -> int:
    """The bytes that are taken now; `peak_since` counts from here."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(before: int, device: torch.device) -> float:
    """GB that were taken at most beside `before`; NaN where the device does not tell."""
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9 if device.type == "cuda" else float("nan")


if __name__ == "__main__":
    raise SystemExit(main())
