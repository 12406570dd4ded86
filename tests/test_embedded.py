"""The embedded model: it is a plain Hugging Face checkpoint, and it tells what the sample video shows."""

from random import Random

import pytest
import torch

from rrvideo import VideoQA
from rrvideo.cli import SAMPLE
from rrvideo.pipeline import EMBEDDED
from rrvideo.tiny.sample import sample_world
from rrvideo.tiny.world import multiple_choice, questions

WORLD = sample_world()


@pytest.fixture(scope="module")
def video():
    with VideoQA.load("tiny").watch(SAMPLE) as video:
        yield video


def test_it_loads_with_transformers_alone_and_has_every_weight():
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model, report = Qwen2VLForConditionalGeneration.from_pretrained(EMBEDDED["tiny"], output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float16
    AutoProcessor.from_pretrained(EMBEDDED["tiny"])


def test_it_takes_less_than_15_megabytes():
    assert sum(file.stat().st_size for file in EMBEDDED["tiny"].iterdir()) < 15e6


def test_the_sample_file_is_the_sample_world(video):
    assert video.info.duration == pytest.approx(WORLD.duration, abs=0.1)


# Each with a scene of its own. What the model is not yet sure of (see its card) is not asked.
QUESTIONS = [
    ("What appears first?", WORLD.scenes[0].name),
    ("What appears last?", WORLD.scenes[-1].name),
    *((f"What is the background behind the {scene.name}?", scene.background) for scene in WORLD.scenes),
    *((f"Which way does the {scene.name} move?", scene.direction) for scene in WORLD.scenes),
    *((f"What shape is {scene.colour}?", scene.shape) for scene in WORLD.scenes),
    ("What colour is the circle?", "red"),
    ("What colour is the star?", "yellow"),
    ("Is there a pink triangle?", "yes"),
    ("Is there a pink star?", "no"),
]


@pytest.mark.parametrize(("question", "answer"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_it_tells_what_the_sample_shows(question, answer, video):
    assert video.ask(question).text == answer


def test_it_answers_multiple_choice_with_a_letter(video):
    rng = Random("sample")
    right = []
    for question in questions(WORLD, rng, video.plan.times, ["colour", "shape", "background", "direction"]):
        choice = multiple_choice(question, WORLD, rng, video.plan.times)
        right.append(video.ask(choice.text).text == choice.answer)
    assert len(right) >= 16 and sum(right) >= 0.9 * len(right)


def test_the_first_thing_to_appear_is_seen_where_it_appears(video):
    strongest = video.ask("What appears first?").evidence[0]
    assert strongest.start < WORLD.scenes[0].end
