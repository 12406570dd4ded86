"""The embedded model's world: what is asked has one answer, and what is drawn shows it."""

from random import Random

import av
import pytest
import torch

from rrvideo.clock import format_time
from rrvideo.tiny.drawing import parameters, render, write_video
from rrvideo.tiny.evaluate import is_right
from rrvideo.tiny.world import (
    BACKGROUNDS,
    CHOICE_KINDS,
    COLOURS,
    KINDS,
    MAX_SCENES,
    Question,
    draw_world,
    multiple_choice,
    questions,
)

SECONDS = [float(second) for second in range(60)]


def worlds(count: int, seconds: float = 60):
    for seed in range(count):
        rng = Random(seed)
        yield rng, draw_world(rng, seconds, 1 + seed % MAX_SCENES)


def middle(scene):
    """When the scene's shape is half-way across for the first time."""
    return scene.start + min(8, scene.end - scene.start) / 2


def is_scene(pixel, background, scene):
    """Which pixels are nearer to the scene's colour than to its background, [height, width] bool."""
    colour = torch.tensor(COLOURS[scene.colour], dtype=torch.float32)
    return (pixel - colour).norm(dim=-1) < (pixel - background).norm(dim=-1)


def test_scenes_follow_one_another_and_none_is_shorter_than_asked():
    for _, world in worlds(40):
        assert world.scenes[0].start == 0 and world.duration == pytest.approx(60)
        assert all(scene.end - scene.start >= 4 - 1e-6 for scene in world.scenes)
        assert all(a.end == b.start for a, b in zip(world.scenes, world.scenes[1:], strict=False))


def test_no_two_scenes_of_a_video_have_one_name():
    assert all(len({scene.name for scene in world.scenes}) == len(world.scenes) for _, world in worlds(40))


@pytest.mark.parametrize(("seconds", "scenes"), [(10, 3), (60, 0), (60, MAX_SCENES + 1)])
def test_scenes_that_do_not_fit_are_refused(seconds, scenes):
    with pytest.raises(ValueError, match="scenes"):
        draw_world(Random(0), seconds, scenes)


def test_a_question_that_is_asked_twice_has_one_answer():
    for rng, world in worlds(60):
        answers: dict[str, set[str]] = {}
        for _ in range(5):  # the wording is drawn anew each time
            for question in questions(world, rng, SECONDS):
                answers.setdefault(question.text, set()).add(question.answer)
        assert all(len(given) == 1 for given in answers.values())


def test_every_kind_of_question_is_asked_of_some_world():
    asked = {question.kind for rng, world in worlds(20) for question in questions(world, rng, SECONDS)}
    assert asked == set(KINDS)


def test_multiple_choice_has_four_options_and_the_right_one_stands_under_its_letter():
    for rng, world in worlds(30):
        for question in questions(world, rng, SECONDS):
            if question.kind not in CHOICE_KINDS:
                continue
            choice = multiple_choice(question, world, rng, SECONDS)
            options = dict(option.split(". ", 1) for option in choice.options)
            assert len(set(options.values())) == 4 and options[choice.answer] == question.answer
            assert choice.text.endswith("The best answer is:") and all(
                option in choice.text for option in choice.options
            )


def test_when_is_the_first_sampled_step_that_shows_the_scene():
    for rng, world in worlds(20):
        shown = {question.text: question.answer for question in questions(world, rng, SECONDS, ["when"])}
        for scene in world.scenes:
            answer = next(answer for text, answer in shown.items() if scene.name in text)
            frames = parameters(world, SECONDS)
            colours = [(*row[:3], row[6]) for row in frames.tolist()]
            target = (*map(float, COLOURS[scene.colour]), frames[int(middle(scene))][6])
            first = colours.index(target)
            assert answer == format_time(first - first % 2)


@pytest.mark.parametrize(("height", "width"), [(56, 56), (84, 112), (240, 135)])
def test_a_frame_shows_the_scenes_colours_and_its_shape_near_the_middle_of_its_path(height, width):
    for _, world in worlds(8):
        for scene in world.scenes:
            picture = render(torch.from_numpy(parameters(world, [middle(scene)]))[0], height, width)
            background = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)
            shape = is_scene(picture, background, scene)
            rows, columns = shape.nonzero().float().mean(0)
            assert abs(columns / width - scene.x) < 0.05 and abs(rows / height - scene.y) < 0.05
            radius = scene.radius * min(height, width)
            assert 1.0 < shape.sum() / radius**2 < 4.0  # a star covers least, a circle and a square most
            torch.testing.assert_close(picture[0, 0], background)


def test_a_shape_moves_the_way_its_scene_says():
    for _, world in worlds(16):
        for scene in world.scenes:
            centres = []
            crossed = min(scene.end, scene.start + 8)  # a shape that has come to its end starts again
            for time in (scene.start + 0.01, crossed - 0.01):
                picture = render(torch.from_numpy(parameters(world, [time]))[0], 90, 90)
                background = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)
                centres.append(is_scene(picture, background, scene).nonzero().float().mean(0))
            down, right = (centres[1] - centres[0]).tolist()
            # Written out again: the world's own table is what is tested.
            expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
            expected_right, expected_down = expected[scene.direction]
            assert right * expected_right + down * expected_down > 15
            assert abs(right * expected_down) + abs(down * expected_right) < 5


def test_a_long_scene_shows_its_motion_again_and_again():
    world = draw_world(Random(3), 40, 1)
    rows = parameters(world, [1.0, 3.0, 9.0, 11.0, 33.0, 35.0])
    first, second = rows[0, 7:9], rows[1, 7:9]
    assert abs(second - first).max() > 0.05
    for i in (2, 4):
        assert rows[i, 7:9] == pytest.approx(first) and rows[i + 1, 7:9] == pytest.approx(second)


def test_the_four_shapes_differ():
    _, world = next(worlds(1))
    row = torch.from_numpy(parameters(world, [2.0]))[0].repeat(4, 1)
    row[:, 6] = torch.arange(4)
    pictures = render(row, 84, 84)
    for a in range(4):
        for b in range(a):
            assert ((pictures[a] - pictures[b]).abs().sum(-1) > 60).sum() > 100


def test_an_encoded_video_shows_each_scene_at_its_time(tmp_path):
    world = draw_world(Random(5), 12, 3)
    write_video(world, tmp_path / "world.mp4", width=96, height=64, fps=5)
    with av.open(str(tmp_path / "world.mp4")) as container:
        frames = {frame.time: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    assert len(frames) == 60
    for scene in world.scenes:
        time = min(frames, key=lambda time: abs(time - middle(scene)))
        picture = torch.from_numpy(frames[time]).float()
        background = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)
        assert (picture[2, 2] - background).abs().max() < 12
        x, y = int(scene.x * 96), int(scene.y * 64)
        assert (picture[y, x] - torch.tensor(COLOURS[scene.colour])).abs().max() < 25


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("red circle", "red circle", True),
        ("red circle", "red", False),
        ("1:02", "1:04", True),
        ("1:02", "1:05", False),
        ("1:02", "soon", False),
        ("red circle 0:10, cyan star 0:30", "red circle 0:12, cyan star 0:28", True),
        ("red circle 0:10, cyan star 0:30", "red circle 0:10", False),
        ("red circle 0:10, cyan star 0:30", "red circle 0:10, cyan star 0:40", False),
    ],
)
def test_an_answer_is_right_when_it_is_exact_but_for_one_step_of_time(expected, answer, right):
    assert is_right(Question("when", "?", expected), answer, step=2.0) == right


def test_an_option_is_right_only_as_its_letter():
    question = Question("when", "?", "B", options=("A. 0:02", "B. 0:04", "C. 0:06", "D. 0:08"))
    assert is_right(question, "B", 2.0) and not is_right(question, "0:04", 2.0)
