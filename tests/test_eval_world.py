"""The set that is drawn in Video-MME's form: what its table says is what its videos show."""

import math
import re
from functools import cache
from itertools import groupby

import av
import numpy as np
import pyarrow.parquet
import pytest
import torch

from rreval import world
from rreval.data import check_set, load_set
from rreval.world import Length, default_folder, make_set
from rrvideo.cli import main
from rrvideo.errors import RRVideoError
from rrvideo.tiny import drawing
from rrvideo.tiny.world import BACKGROUNDS, COLOURS

SMALL = {"short": Length((8, 12), (2, 4), fps=4), "long": Length((20, 24), (4, 5), fps=2)}
TABLE = "videomme/test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("world") / "set", videos=5, lengths=SMALL)


@pytest.fixture(scope="module")
def rows(folder):
    return pyarrow.parquet.read_table(folder / TABLE).to_pylist()


@pytest.fixture
def undrawn(monkeypatch):
    """Do not draw the videos, but note what they would show."""
    noted = {}

    def note(drawn, path, **_):
        noted[path.stem] = drawn
        path.touch()

    monkeypatch.setattr(world, "write_video", note)
    return noted


@cache
def scenes_of(path):
    """What a video shows, seen by nothing but its pixels: start in seconds, colour and background of each scene."""
    shown = []
    for time, pixels in zip(*frames_of(path), strict=True):
        background = nearest(pixels[1, 1], BACKGROUNDS)
        away = np.linalg.norm(pixels - BACKGROUNDS[background], axis=-1)
        inside = pixels[away > 0.8 * away.max()]  # without the edges
        shown.append((time, nearest(np.median(inside, axis=0), COLOURS), background))
    return [next(run) for _, run in groupby(shown, key=lambda frame: frame[1:])]


def nearest(pixel, palette):
    return min(palette, key=lambda name: np.linalg.norm(pixel - np.array(palette[name])))


def test_it_has_ten_videos_of_each_duration_with_three_questions_of_kinds_asked_as_often(tmp_path, undrawn):
    made = make_set(tmp_path / "set")
    rows = pyarrow.parquet.read_table(made / TABLE).to_pylist()
    assert len(rows) == 90 and len({row["question_id"] for row in rows}) == 90
    assert [row["video_id"] for row in rows] == [f"{1 + number // 3:03}" for number in range(90)]
    assert [row["duration"] for row in rows] == ["short"] * 30 + ["medium"] * 30 + ["long"] * 30
    bounds = {"short": (0, 2), "medium": (4, 15), "long": (30, 60)}  # minutes, those of Video-MME
    for row in rows:
        least, most = bounds[row["duration"]]
        assert least * 60 <= undrawn[row["videoID"]].duration < most * 60
    assert len(list((made / "subtitle").iterdir())) == 12  # every third
    asked = [row["task_type"] for row in rows]
    assert {asked.count(task) for task in ("Object Recognition", "Action Recognition", "Counting Problem")} <= {
        8,
        9,
        10,
    }


def test_the_table_has_the_official_columns_and_four_options_under_their_letters(rows):
    columns = "video_id duration domain sub_category url videoID question_id task_type question options answer"
    for row in rows:
        assert set(row) == set(columns.split())
        assert [option[:3] for option in row["options"]] == ["A. ", "B. ", "C. ", "D. "]
        assert len({option[3:] for option in row["options"]}) == 4 and row["answer"] in "ABCD"


def test_the_reader_of_video_mme_finds_every_video_and_no_fault(folder):
    items = load_set(folder)
    assert [len(item.rows) for item in items] == [3] * 10
    assert check_set(items, thorough=True) == []
    assert sum(item.subtitle is not None for item in items) == 4


def test_the_right_options_are_what_the_videos_show(folder, rows):
    checked = 0
    for row in rows:
        scenes = scenes_of(folder / "data" / f"{row['videoID']}.mp4")
        colours = [colour for _, colour, _ in scenes]
        answer = row["options"]["ABCD".index(row["answer"])][3:]
        named = re.search(r"the (\w+) (?:circle|square|triangle|star)", row["question"])
        place = colours.index(named[1]) if named and colours.count(named[1]) == 1 else None
        if "first" in row["question"]:
            shown = colours[0]
        elif "last" in row["question"]:
            shown = colours[-1]
        elif "How many" in row["question"]:
            shown = str(len(scenes))
        elif place is None:
            continue
        elif "after" in row["question"]:
            shown = colours[place + 1]
        elif "before" in row["question"]:
            shown = colours[place - 1]
        elif "background" in row["question"]:
            shown = scenes[place][2]
        elif "appear" in row["question"]:
            minutes, seconds = map(int, answer.split(":"))
            assert 0 <= minutes * 60 + seconds - scenes[place][0] <= 1
            shown = answer.split(" ")[0]
        else:
            continue
        assert answer.split(" ")[0] == shown, row
        checked += 1
    assert checked >= 12


def test_a_time_is_asked_for_only_where_the_other_options_are_times_of_other_scenes(tmp_path, undrawn):
    rows = pyarrow.parquet.read_table(make_set(tmp_path / "set") / TABLE).to_pylist()
    timed = [row for row in rows if ":" in row["options"][0]]
    assert len(timed) >= 5
    for row in timed:
        offered = {int(m) * 60 + int(s) for m, s in (option[3:].split(":") for option in row["options"])}
        assert offered <= {math.ceil(scene.start) for scene in undrawn[row["videoID"]].scenes}


def test_subtitles_name_the_shapes_while_they_are_shown(folder):
    for path in (folder / "subtitle").iterdir():
        entries = re.findall(r"(\d+)\n(\S+) --> (\S+)\n(.+)\n", path.read_text())
        starts = [seconds(start) for _, start, _, _ in entries]
        shown = [start for start, _, _ in scenes_of(folder / "data" / f"{path.stem}.mp4")]
        assert [int(number) for number, *_ in entries] == list(range(1, len(shown) + 1))
        assert starts == pytest.approx(shown, abs=0.5)  # a frame's time is at most as much later
        assert all(seconds(start) < seconds(end) for _, start, end, _ in entries)


def seconds(time):
    hours, minutes, rest = re.fullmatch(r"(\d\d):(\d\d):(\d\d,\d{3})", time).groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))


def test_the_same_set_is_drawn_again(folder, tmp_path):
    again = make_set(tmp_path / "again", videos=5, lengths=SMALL)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.*"))]
    assert len(files) == 1 + 10 + 4
    for file in files:
        if file.suffix == ".mp4":
            times, pictures = frames_of(folder / file)
            same_times, similar = frames_of(again / file)
            assert times == same_times and abs(pictures - similar).mean() < 1
        else:
            assert (folder / file).read_bytes() == (again / file).read_bytes()


def frames_of(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.time for frame in frames], np.stack(
        [frame.to_ndarray(format="rgb24").astype(float) for frame in frames]
    )


def test_a_set_that_is_there_is_not_drawn_again(folder, undrawn):
    assert make_set(folder) == folder
    assert not undrawn


def test_a_set_that_was_broken_off_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world, "write_video", fail)
    with pytest.raises(RRVideoError, match="No space left"):
        make_set(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_the_set_of_another_process_that_was_faster_is_taken(tmp_path, monkeypatch, folder):
    def outpaced(drawn, path, **_):
        other = tmp_path / "set" / TABLE
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"theirs")

    monkeypatch.setattr(world, "write_video", outpaced)
    assert (make_set(tmp_path / "set") / TABLE).read_bytes() == b"theirs"


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RRVideoError, match="holds something else"):
        make_set(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_command_says_where_the_set_is(tmp_path, monkeypatch, undrawn, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["eval", "world", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{default_folder()}\n"
    assert (default_folder() / TABLE).exists() and tmp_path in default_folder().parents


def test_the_word_world_stands_for_the_set_wherever_a_set_is_named(tmp_path, monkeypatch, folder, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default_folder().parent.mkdir(parents=True)
    default_folder().symlink_to(folder)
    assert main(["eval", "check", "world"]) == 0
    assert capsys.readouterr().out.startswith("10 videos, 30 questions, 4 with subtitles; problems: 0")


def test_videos_are_drawn_by_one_thread_and_the_others_are_given_back(tmp_path, monkeypatch):
    threads, seen, render = torch.get_num_threads(), set(), drawing.render
    monkeypatch.setattr(drawing, "render", lambda *given: seen.add(torch.get_num_threads()) or render(*given))
    torch.set_num_threads(2)
    try:
        make_set(tmp_path / "set", videos=1, lengths={"short": Length((4, 4), (1, 2), fps=2)})
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(threads)
