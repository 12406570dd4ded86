"""Sets in Video-MME's form: the same from every kind of file, chosen from, and checked before a run."""

import json
import shutil

import pytest
from videomme import rows, write_set, write_table

from rreval import data
from rreval.data import Row, check_set, digest, load_set, seconds_of, select
from rrvideo.errors import RRVideoError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set of six videos, as a folder."""
    return write_set(tmp_path_factory.mktemp("set") / "set", videos=6)


def nested(table):
    """The form of the official result file, which does not say the videos' ids but where they are from."""
    of_video = ("video_id", "duration", "domain", "sub_category", "url")
    of_question = ("question_id", "task_type", "question", "options", "answer")
    return [
        {name: table[i][name] for name in of_video}
        | {"questions": [{name: row[name] for name in of_question} | {"response": ""} for row in table[i : i + 3]]}
        for i in range(0, len(table), 3)
    ]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("videomme/test-00000-of-00001.parquet", list),
        ("test-00000-of-00001.parquet", list),
        ("any.parquet", list),
        ("questions.json", list),
        ("questions.jsonl", list),
        ("results.json", nested),
    ],
)
def test_every_form_of_a_table_gives_the_same_questions(tmp_path, name, form):
    table = rows(2)
    table[0]["question"] = "What does “¿Qué?”\u2028mean?"  # which is no end of a line in JSON
    write_table(tmp_path / name, form(table))
    items = load_set(tmp_path)

    assert [row for item in items for row in item.rows] == [
        Row(**row | {"options": tuple(row["options"])}) for row in table
    ]
    assert [(item.video_id, item.videoID, item.duration) for item in items] == [
        ("001", "-clip_1", "short"),
        ("002", "-clip_2", "medium"),
    ]
    assert items == load_set(tmp_path / name, videos=tmp_path)


def test_a_table_in_parts_is_read_whole_and_other_tables_beside_it_are_not(tmp_path):
    table = rows(3)
    for part in range(3):
        write_table(tmp_path / f"test-0000{part}-of-00003.parquet", table[3 * part : 3 * part + 3])
    write_table(tmp_path / "other.parquet", rows(9))

    assert digest(load_set(tmp_path)) == digest(load_set(write_table(tmp_path / "all.json", table)))


def test_a_set_on_the_hub_is_read_with_datasets_and_its_videos_from_a_folder(tmp_path, whole, monkeypatch):
    import datasets

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: load_dataset(str(whole / name.split("/")[1]), split=split, cache_dir=str(tmp_path)),
    )

    assert load_set("lmms-lab/videomme", videos=whole) == load_set(whole)
    with pytest.raises(RRVideoError, match="--videos"):
        load_set("lmms-lab/videomme")
    with pytest.raises(RRVideoError, match="the hub did not give it"):
        load_set("lmms-lab/no-such-set", videos=whole)


def test_videos_and_subtitles_are_found_in_their_places_whatever_their_suffix(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data" / "-clip_1.mp4").rename(tmp_path / "data" / "-clip_1.MKV")
    (tmp_path / "data" / "-clip_2.webm").touch()
    (tmp_path / "data" / "-clip_3.mp4").rename(tmp_path / "data" / "-clip_3.mp4.part")
    (tmp_path / "data" / "-clip_3.info.json").touch()
    items = load_set(tmp_path)

    assert [item.path.name for item in items[:3]] == ["-clip_1.MKV", "-clip_2.mp4", "-clip_3.mp4"]
    assert [item.subtitle for item in items] == [tmp_path / "subtitle" / "-clip_1.srt", *[None] * 5]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["001", "002", "003", "004", "005", "006"]),
        ({"duration": ["short"]}, ["001", "004"]),
        ({"duration": ["short", "long"], "domain": ["Knowledge"]}, ["004", "006"]),
        ({"limit": 2}, ["001", "002"]),
        ({"limit": 1, "duration": ["medium"]}, ["002"]),
        ({"ids": ["-clip_5", "002"]}, ["002", "005"]),
        ({"ids": ["003-2", "004"], "duration": ["long"]}, ["003"]),
    ],
)
def test_filters_choose_videos(whole, filters, expected):
    assert [item.video_id for item in load_set(whole, **filters)] == expected


def test_the_id_of_a_question_chooses_it_alone(whole):
    items = load_set(whole, ids=["003-2", "003-3", "001"])

    assert [[row.question_id for row in item.rows] for item in items] == [
        ["001-1", "001-2", "001-3"],
        ["003-2", "003-3"],
    ]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"duration": ["shrot"]}, "no duration shrot.*long, medium, short"),
        ({"domain": ["Cooking"]}, "no domain Cooking.*Film & Television, Knowledge"),
        ({"ids": ["001", "901", "x"]}, "no id 901, x"),
        ({"ids": ["001"], "duration": ["long"]}, "no video of the set is chosen"),
    ],
)
def test_a_filter_that_cannot_be_met_says_so(whole, filters, message):
    with pytest.raises(RRVideoError, match=message):
        select(load_set(whole), **filters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, r"row 2 of t.json: answer must be a letter from A to D, got 'E'"),
        ({"options": "A. One. B. Two."}, "options must be a list"),
        ({"options": ["A. One."]}, "options must be a list"),
        ({"question": None}, "row 2 of t.json lacks question"),
        ({"question_id": "001-1"}, "question 001-1 is in .* twice"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, change, message):
    table = rows(1)
    table[1] |= change
    write_table(tmp_path / "t.json", table)

    with pytest.raises(RRVideoError, match=message):
        load_set(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1 and no more", "t.parquet cannot be read"),
        ("t.json", b"[{", "t.json cannot be read"),
        ("t.jsonl", b"\xff\xfe", "t.jsonl cannot be read"),
        ("t.json", b'{"a": 1}', "is not a list of questions"),
        ("t.json", b"[]", "holds no questions"),
        ("notes.txt", b"", "holds no questions: no .parquet, .json or .jsonl file"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(RRVideoError, match=message):
        load_set(tmp_path)


def test_a_folder_with_two_tables_or_none_at_all_is_not_guessed_at(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(rows(1)))
    with pytest.raises(RRVideoError, match=r"several sets: a.json, b.json .*name one"):
        load_set(tmp_path)
    assert len(load_set(tmp_path / "b.json")) == 1
    with pytest.raises(RRVideoError, match="there is no folder"):
        load_set(tmp_path / "c" / "d")


def test_a_check_says_what_is_missing_and_what_cannot_be_read(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert check_set(load_set(tmp_path)) == check_set(load_set(tmp_path), thorough=True) == []
    files = [tmp_path / "data" / f"-clip_{number}.mp4" for number in range(1, 7)]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:1500])
    files[3].write_bytes(b"")
    (tmp_path / "subtitle" / "-clip_5.srt").write_text("no times at all")
    found = {problem.item.video_id: (problem.fatal, problem.message) for problem in check_set(load_set(tmp_path))}

    assert {video: fatal for video, (fatal, _) in found.items()} == {
        "002": True,
        "003": True,
        "004": True,
        "005": False,
    }
    for video, words in (("002", "there is no file"), ("003", "incomplete"), ("004", "empty"), ("005", "no .srt file")):
        assert words in found[video][1]


def test_a_thorough_check_finds_a_file_that_ends_early(tmp_path, whole):
    import av

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data" / "-clip_6.mp4"
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".mkv")), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path.unlink()
    path = path.with_suffix(".mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    items = load_set(tmp_path)

    assert check_set(items) == []
    (problem,) = check_set(items, thorough=True)
    assert problem.item.video_id == "006"
    assert not problem.fatal
    assert "ends early" in problem.message


def test_the_length_of_a_video_is_its_own_and_nothing_where_there_is_none(whole, tmp_path):
    items = load_set(whole)

    assert [round(seconds_of(item)) for item in items] == [2, 4, 6, 2, 4, 6]
    assert seconds_of(load_set(whole, videos=tmp_path)[0]) == 0


@pytest.mark.parametrize("name", [name for name in data.Row.__slots__ if name not in {"options", "answer"}])
def test_the_digest_of_a_set_knows_each_of_its_words(tmp_path, name):
    table = rows(1)
    before = digest(load_set(write_table(tmp_path / "a.json", table)))
    for row in table:
        row[name] += "!"

    assert digest(load_set(write_table(tmp_path / "b.json", table))) != before
    assert digest(load_set(write_table(tmp_path / "c.json", list(reversed(rows(1)))))) == before
