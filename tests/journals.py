"""Runs of Video-MME as their journals would hold them, with answers drawn rather than found."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from rreval.journal import Journal, Record, begin_run

DURATIONS = ("short", "medium", "long")
DOMAINS = ("Knowledge", "Film & Television", "Sports Competition")
TASKS = ("Counting Problem", "Temporal Reasoning", "Object Recognition", "OCR Problems")
TOKENS = {"short": 6_000, "medium": 24_000, "long": 60_000}
SETTINGS = {"model": "a-model", "attention": "full", "tau": 0.95, "fps": 1.0, "max_frames": 768}


def draw_records(videos: int = 30, *, accuracy: float = 0.6, density: float = 1.0, seed: int = 0) -> list[Record]:
    """Three answered questions about each video, right with about this probability, alike within a video."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(videos):
        duration = DURATIONS[number * 3 // videos]
        domain = DOMAINS[number % len(DOMAINS)]
        chance = generator.beta(3 * accuracy, 3 * (1 - accuracy))
        tokens = int(TOKENS[duration] * generator.uniform(0.4, 1.4))
        kept = density + (1 - density) * 4000 / (tokens + 4000) if density < 1 else 1.0
        watching = {"decode": tokens / 9000, "encode": tokens / 4000, "prefill": tokens * kept / 3000}
        for part in (1, 2, 3):
            answer = "ABCD"[generator.integers(4)]
            letter = answer if generator.random() < chance else "ABCD"[("ABCD".index(answer) + part) % 4]
            records.append(
                Record(
                    question_id=f"{number + 1:03}-{part}",
                    video_id=f"{number + 1:03}",
                    videoID=f"video{number + 1}",
                    duration=duration,
                    domain=domain,
                    sub_category=f"{domain} {number % 2 + 1}",
                    task_type=TASKS[(number + part) % len(TASKS)],
                    question=f"What happens in part {part}?",
                    options=("A. This.", "B. That.", "C. Both.", "D. Neither."),
                    answer=answer,
                    response=letter,
                    prediction=letter,
                    density=kept,
                    frames=tokens // 100,
                    visual_tokens=tokens,
                    prompt_tokens=tokens + 90 + part,
                    answer_tokens=2,
                    seconds={**watching, "generate": 0.2 + tokens / 1e6},
                )
            )
    return records


def unread(record: Record, response: str) -> Record:
    """The record with a response in which our parser finds no letter."""
    return replace(record, response=response, prediction=None)


def failed(record: Record, reason: str) -> Record:
    """The record of a question that could not be asked."""
    kept = {name: getattr(record, name) for name in list(Record.__dataclass_fields__)[:10]}
    return Record(**kept, error=reason)


def altered(records: list[Record], shares: tuple[float, float], *, seed: int = 1, density: float = 0.6) -> list[Record]:
    """The same questions in another run, which loses and gains about these shares of them."""
    generator = np.random.default_rng(seed)
    lost, gained = shares
    found = []
    for record in records:
        letter = record.prediction
        if letter == record.answer and generator.random() < lost:
            letter = "ABCD"[("ABCD".index(letter) + 1) % 4]
        elif letter != record.answer and generator.random() < gained:
            letter = record.answer
        kept = density + (1 - density) * 4000 / (record.visual_tokens + 4000)
        seconds = record.seconds | {"prefill": record.seconds["prefill"] * kept}
        found.append(replace(record, response=letter, prediction=letter, density=kept, seconds=seconds))
    return found


def write_run(folder: Path, records: list[Record], **settings: object) -> Path:
    """A folder as a finished run leaves it."""
    begin_run(folder, SETTINGS | settings)
    with Journal(folder) as journal:
        for record in records:
            journal.append(record)
    return folder
