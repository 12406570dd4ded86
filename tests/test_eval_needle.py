"""The visual needle test: what is hidden is odd and lies where it is said to, and what is measured is kept."""

import json
from dataclasses import replace
from itertools import pairwise
from random import Random

import av
import numpy as np
import pytest
from PIL import Image

from rrattention import RRConfig
from rrattention.transformers import settings
from rreval import heatmap
from rreval.needle import NeedleTest, Trial, hide, measure, questions_about, read_trials
from rrvideo import VideoQA
from rrvideo.cli import main
from rrvideo.errors import BudgetError, RRVideoError
from rrvideo.tiny.drawing import write_video
from rrvideo.tiny.world import BACKGROUNDS, COLOURS

SHORT = NeedleTest(lengths=(240,), depths=(0.0, 1.0), videos=1, taus=(0.5,))


@pytest.fixture(scope="module")
def qa():
    """A model that is sparse however short the video is."""
    return VideoQA.load("tiny", config=RRConfig(block_size=64, min_tokens=0))


def trial(attention="full", depth=0.0, right=4, video=0, length=1024, **other):
    figures = {"visual_tokens": length, "prompt_tokens": 2 * length, "density": 1.0}
    times = {"decode": 0.1, "encode": 0.2, "prefill": 0.5}
    return Trial(attention, length, depth, video, right=right, asked=4, **figures | times | other)


@pytest.mark.parametrize("steps", [6, 7, 9, 30, 341])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.61, 0.9, 1.0])
def test_the_needle_is_the_one_odd_scene_and_lies_at_its_depth(steps, depth):
    for seed in range(20):
        world, needle = hide(Random(seed), steps, depth)
        assert (needle.start, needle.end - needle.start) == (round(depth * (steps - 2)), 2)
        others = [scene for scene in world.scenes if scene != needle]
        assert 2 <= len(others) == len(world.scenes) - 1
        assert needle.colour not in {scene.colour for scene in others}
        assert needle.shape not in {scene.shape for scene in others}
        borders = [*(scene.start for scene in world.scenes), steps]
        assert borders[0] == 0 and all(b - a >= 1 for a, b in pairwise(borders))
        assert [scene.end for scene in world.scenes] == borders[1:]


def test_what_is_too_short_to_hide_anything_is_refused():
    with pytest.raises(ValueError, match="steps must be 6 at least, not 5"):
        hide(Random(0), 5, 0.5)


def test_only_the_needles_own_frames_show_it(tmp_path):
    world, needle = hide(Random(3), 30, 0.4)
    write_video(world, tmp_path / "needle.mp4", width=112, height=84, fps=2)
    with av.open(str(tmp_path / "needle.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    # Its shape where it is large, its background in the corner.
    red_green_blue, behind = np.array(COLOURS[needle.colour]), np.array(BACKGROUNDS[needle.background])
    shown = [
        (np.linalg.norm(picture - red_green_blue, axis=-1) < 30).mean() > 0.05
        and np.linalg.norm(picture[1, 1] - behind) < 30
        for picture in pictures
    ]
    assert len(pictures) == 60
    assert [number for number, seen in enumerate(shown) if seen] == [22, 23, 24, 25]  # 0.4 x 28 steps, of two frames


def test_its_questions_have_one_right_option_each():
    for seed in range(30):
        world, needle = hide(Random(seed), 40, 0.5)
        asked = questions_about(needle, world, Random(seed))
        answers = [dict(option.split(". ") for option in each.options)[each.answer] for each in asked]
        assert answers == [needle.colour, needle.shape, needle.background, needle.direction]
        assert all(len({option[3:] for option in each.options}) == 4 for each in asked)
        assert needle.colour not in asked[0].text.partition("\n")[2].partition("\n")[0]  # the question does not tell


def test_every_way_to_attend_sees_all_frames_of_the_same_videos(qa, tmp_path):
    told = []
    trials = list(measure(qa, SHORT, tmp_path, progress=lambda *counts: told.append(counts)))
    assert [(each.attention, each.depth) for each in trials] == [
        ("full", 0.0), ("tau 0.5", 0.0), ("full", 1.0), ("tau 0.5", 1.0),
    ]  # fmt: skip
    assert {(each.visual_tokens, each.asked) for each in trials} == {(240, 4)}
    assert {each.density for each in trials if each.attention == "full"} == {1.0}
    assert all(each.density < 0.95 for each in trials if each.attention != "full")
    assert sum(each.right for each in trials if each.attention == "full") >= 6  # of 8; 2 by chance
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert read_trials(tmp_path) == trials


def test_a_test_that_was_killed_goes_on_where_it_was_and_leaves_the_model_as_it_found_it(qa, tmp_path):
    before = settings(qa.checkpoint.model)
    broken_off = measure(qa, SHORT, tmp_path)
    first = next(broken_off)
    broken_off.close()
    assert settings(qa.checkpoint.model) == before
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"attention": "tau 0.5", "len')  # what a kill leaves behind
    assert read_trials(tmp_path) == [first]
    assert len(list(measure(qa, SHORT, tmp_path))) == 3
    assert len({each.key for each in read_trials(tmp_path)}) == len(read_trials(tmp_path)) == 4
    assert list(measure(qa, SHORT, tmp_path)) == []


def test_other_depths_add_to_what_is_there_and_another_rule_does_not(qa, tmp_path):
    more = replace(SHORT, depths=(0.0, 0.5), taus=())
    list(measure(qa, replace(more, depths=(0.0,)), tmp_path))
    assert [each.depth for each in measure(qa, more, tmp_path)] == [0.5]
    other = VideoQA.load("tiny", config=RRConfig(block_size=128, min_tokens=0))
    with pytest.raises(RRVideoError, match=r"other settings: .*block_size"):
        next(measure(other, more, tmp_path))


def test_what_draws_is_missed_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heatmap, "find_spec", lambda name: None)
    short = ["--lengths", "1K", "--depths", "50", "--videos", "1"]
    assert main(["eval", "needle", "--out", str(tmp_path / "run"), *short]) == 1
    assert "matplotlib, which draws, is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_tests_do_not_write_to_one_folder_at_once(qa, tmp_path):
    first = measure(qa, SHORT, tmp_path)
    next(first)
    with pytest.raises(RRVideoError, match=r"another process is writing to .*trials\.jsonl"):
        next(measure(qa, SHORT, tmp_path))
    first.close()
    assert len(list(measure(qa, SHORT, tmp_path))) == 3


def test_a_test_with_weights_of_heads_goes_on_and_other_weights_do_not(qa, tmp_path):
    text = qa.checkpoint.model.config.get_text_config()
    weights = [[1.5, *[0.9] * (text.num_attention_heads - 1)]] * text.num_hidden_layers
    config = replace(settings(qa.checkpoint.model)[0], head_weights=weights)
    weighted = qa.attending("rr", config)
    list(measure(weighted, replace(SHORT, depths=(0.0,)), tmp_path))
    assert {each.depth for each in measure(weighted, SHORT, tmp_path)} == {1.0}
    with pytest.raises(RRVideoError, match=r"other settings: .*head_weights"):
        next(
            measure(
                qa.attending("rr", replace(config, head_weights=[*weights[1:], weights[0][::-1]])),
                SHORT,
                tmp_path,
            )
        )


def test_a_model_that_wants_large_frames_gets_them_and_as_many_tokens(qa, tmp_path):
    limits = replace(qa.checkpoint.limits, min_pixels=100 * 28 * 28, max_pixels=768 * 28 * 28)
    large = VideoQA(replace(qa.checkpoint, limits=limits))
    test = NeedleTest(lengths=(800,), depths=(0.5,), videos=1, taus=())
    (seen,) = measure(large, test, tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    step = kept["width"] * kept["height"] // 28**2
    assert 100 <= step <= 130 and kept["width"] > kept["height"]
    assert 800 <= seen.visual_tokens < 800 + step and seen.visual_tokens % step == 0


@pytest.mark.parametrize(
    ("length", "message"), [(65536, r"65,536 visual tokens need \d+,\d+ positions"), (60, "too short to hide")]
)
def test_a_length_that_cannot_be_is_refused_before_anything_is_watched(qa, tmp_path, length, message):
    with pytest.raises(BudgetError, match=message):
        next(measure(qa, NeedleTest(lengths=(240, length)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"lengths": (0,)}, {"depths": (1.5,)}, {"taus": (0.0,)}, {"videos": 0}])
def test_a_test_out_of_bounds_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NeedleTest(**wrong)


def test_the_table_has_the_share_of_right_answers_over_depth_and_length_and_what_it_took():
    trials = [trial(right=4), trial(right=1, video=1), trial(depth=1.0, right=0, length=2048, prefill=2.0)]
    trials += [trial("tau 0.9", right=2, density=0.25), trial("tau 0.9", right=2, video=1, density=0.75)]
    full, sparse = heatmap.markdown(heatmap.grids(trials[::-1])).split("\n\nRRAttention, tau 0.9:\n\n")
    assert full.startswith("full attention:\n\n")
    assert cells(full) == {
        "depth": ["1K", "2K"],
        "0%": ["62%", ""],  # 5 of 8
        "100%": ["", "0%"],
        "density": ["1.00", "1.00"],
        "prefill, seconds": ["0.50", "2.00"],
        "visual tokens": ["1,024", "2,048"],
        "all tokens": ["2,048", "4,096"],
    }
    assert cells(sparse)["0%"] == ["50%", ""] and cells(sparse)["density"] == ["0.50", ""]


def cells(table):
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in row] for name, *row in rows}


def test_the_heatmap_is_a_picture_that_is_darkest_where_nothing_was_found(tmp_path):
    trials = [trial(depth=depth, right=4 * (depth != 0.5)) for depth in (0.0, 0.5, 1.0)]
    heatmap.draw(heatmap.grids(trials), tmp_path / "heatmap.png")
    picture = np.asarray(Image.open(tmp_path / "heatmap.png").convert("RGB")).astype(int)
    yellow, purple = (np.abs(picture - colour).sum(-1) < 30 for colour in ((253, 231, 36), (68, 1, 84)))
    rows = [np.flatnonzero(found.sum(1) > 50) for found in (yellow, purple)]  # of pixels
    assert rows[0].min() < rows[1].min() < rows[1].max() < rows[0].max()


def test_the_command_prints_the_table_and_draws_the_heatmap(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["eval", "needle", "--out", str(out), "--lengths", "100", "--depths", "50", "--videos", "1", "--quiet"]
    assert main(command) == 0
    assert "| 50%" in capsys.readouterr().out
    assert (out / "heatmap.png").stat().st_size > 1000
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [grid["attention"] for grid in printed] == ["full", "tau 0.95"]
    assert printed[0]["cells"][0]["depth"] == 0.5 and printed[0]["lengths"][0]["visual_tokens"] == 108


@pytest.mark.parametrize(("option", "value"), [("--depths", "101"), ("--depths", "end"), ("--lengths", "0.5")])
def test_wrong_usage_is_told_before_a_model_is_loaded(option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "needle", "--out", "run", option, value])
    assert exit_.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_a_folder_without_a_needle_test_is_told(tmp_path):
    with pytest.raises(RRVideoError, match="cannot be read"):
        read_trials(tmp_path)
