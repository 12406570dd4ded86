"""The embedded model: it is a plain Hugging Face checkpoint, and it tells what the sample video shows."""

from itertools import pairwise
from random import Random

import pytest
import torch

from rrvideo import VideoQA
from rrvideo.cli import SAMPLE
from rrvideo.pipeline import EMBEDDED
from rrvideo.tiny.drawing import write_video
from rrvideo.tiny.evaluate import is_right
from rrvideo.tiny.sample import sample_world
from rrvideo.tiny.world import Question, appearances, draw_world, multiple_choice, questions, scene_of

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
    *((f"What comes after the {a.name}?", b.name) for a, b in pairwise(WORLD.scenes)),
    *((f"What appears right before the {b.name}?", a.name) for a, b in pairwise(WORLD.scenes)),
    ("How many scenes are there?", str(len(WORLD.scenes))),
]


@pytest.mark.parametrize("number", range(len(WORLD.scenes)))
def test_it_tells_when_each_scene_begins(number, video):
    scene, times = WORLD.scenes[number], video.plan.times
    answer = video.ask(f"When does the {scene.name} appear?").text
    assert is_right(Question("when", "", appearances(WORLD, times)[number]), answer, step=2.0)


def test_it_describes_the_sample(video):
    first = WORLD.scenes[0]
    assert f"{first.name} on {first.background} moving {first.direction}" in video.ask("Describe the video.").text


@pytest.mark.parametrize(("question", "answer"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_it_tells_what_the_sample_shows(question, answer, video):
    assert video.ask(question).text == answer


def test_it_keeps_its_bearings_in_a_chat(video):
    chat = video.chat()
    asked = QUESTIONS[1:16:3]
    assert [chat.ask(question).text for question, _ in asked] == [answer for _, answer in asked]


def test_it_answers_multiple_choice_with_a_letter(video):
    rng = Random("sample")
    right = []
    for question in questions(WORLD, rng, video.plan.times, ["colour", "shape", "background", "direction"]):
        choice = multiple_choice(question, WORLD, rng, video.plan.times)
        right.append(video.ask(choice.text).text == choice.answer)
    assert len(right) >= 16 and sum(right) >= 0.9 * len(right)


def test_the_strongest_evidence_meets_the_scene_that_a_question_is_about(tmp_path):
    qa, rng, meets = VideoQA.load("tiny"), Random("videos that no layer was chosen on"), []
    for number in range(5):
        world = draw_world(rng, 40, rng.randint(3, 6))
        write_video(world, tmp_path / f"{number}.mp4", width=160, height=120, fps=10)
        with qa.watch(tmp_path / f"{number}.mp4") as video:
            asked = [question for question in questions(world, rng, video.plan.times) if scene_of(question, world)]
            for question in rng.sample(asked, 10):
                strongest, scene = video.ask(question.text).evidence[0], scene_of(question, world)
                meets.append(strongest.start < scene.end and scene.start < strongest.end)
    assert sum(meets) >= 0.7 * len(meets)
