"""The chat as a program uses it, through gradio_client, and what its server refuses."""

from pathlib import Path

import httpx
import pytest
from chatting import served
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from rrdemo.api import _Way
from rrdemo.conversation import Phase, Queued
from rrvideo import VideoQA
from rrvideo.cli import SAMPLE
from rrvideo.tiny.sample import sample_world

pytest_plugins = ["browsing"]


@pytest.fixture(scope="module")
def client(chat):
    client = Client(chat.url, verbose=False)
    yield client
    client.close()


def test_a_program_watches_a_video_and_asks_about_it(client):
    watched = client.predict(handle_file(SAMPLE), api_name="/watch")
    assert watched["state"] == "watched"
    assert watched["plan"]["frames"] == 60
    assert {*watched["seconds"]} == {"decode", "encode", "prefill"}

    answer = client.predict("What appears first?", api_name="/ask")
    with VideoQA.load("tiny", device="cpu").watch(SAMPLE) as video:
        expected = video.ask("What appears first?")
    assert answer["answer"] == expected.text == sample_world().scenes[0].name
    assert [each["start"] for each in answer["evidence"]] == pytest.approx([each.start for each in expected.evidence])
    assert answer["usage"] == expected.usage.to_dict()


def test_settings_have_names_and_defaults_and_hold_for_the_questions(client):
    options = {"start": "0:20", "end": "40", "fps": 0.5, "max_frames": 8, "attention": "full"}
    watched = client.predict(video=handle_file(SAMPLE), **options, api_name="/watch")
    assert watched["plan"]["frames"] == 8
    assert min(watched["plan"]["times"]) >= 20

    answer = client.predict(question="What appears last?", api_name="/ask")
    assert answer["settings"]["attention"] == "full"
    assert (answer["settings"]["start"], answer["settings"]["end"]) == (20, 40)
    assert answer["usage"]["frames"] == 8


def test_an_answer_comes_piece_by_piece(client):
    client.predict(handle_file(SAMPLE), api_name="/watch")
    *pieces, last = client.submit("What appears first?", api_name="/ask")

    assert [piece["state"] for piece in pieces] == ["answering"] * len(pieces)
    assert last["state"] == "done"
    assert last["video"] == SAMPLE.name
    assert all(last["answer"].startswith(piece["answer"]) for piece in pieces)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fps": 0}, "frames per second must be a number above 0"),
        ({"fps": 1e9}, "1,000 at most"),
        ({"max_frames": -1}, "frames at most must be a whole number above 0"),
        ({"max_frames": 800}, "ask for 768 at most"),
        ({"start": "1:99"}, "59"),
        ({"start": "-5"}, "got '-5'"),
        ({"start": "50", "end": "40"}, "ends before it starts"),
        ({"start": "2:00"}, r"starts at 2:00 \(120.00 s\), but the video is 1:00 long"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_words_and_is_nothing_for_the_log(client, options, told, capfd, caplog):
    with pytest.raises(AppError, match=told):
        client.predict(handle_file(SAMPLE), **options, api_name="/watch")
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text


def test_a_phase_is_told_of_at_most_ten_times_a_second_and_always_at_its_end():
    now, frames = iter((0.0, 0.05, 0.11, 0.12, 0.13)), (0, 1, 2, 3)
    way = _Way(clock=lambda: next(now))
    told = [each["done"] for done in frames for each in way.told(Phase("decode", done, 3, 0.1))]
    end = [*way.told(Phase("decode", 3, 3, 0.1, finished=True))]

    assert told == [0, 2]
    assert end == [{"state": "watching", "phase": "decode", "done": 3, "total": 3, "seconds": 0.1}]
    assert [*way.told(Queued(2))] == [{"state": "waiting", "position": 2}]


def test_a_client_that_listens_is_told_of_each_phase_now_and_then_and_of_its_end(client):
    told = [
        each for each in client.submit(handle_file(SAMPLE), fps=4, api_name="/watch") if each["state"] == "watching"
    ]

    for phase, total in (("decode", 240), ("encode", 240)):
        done = [each["done"] for each in told if each["phase"] == phase]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, total)
        assert len(done) < 60  # not every frame
        seconds = [each["seconds"] for each in told if each["phase"] == phase]
        assert seconds == sorted(seconds)


def test_a_question_without_a_video_is_told_in_words_and_so_is_what_is_no_video(chat, client, tmp_path):
    with pytest.raises(AppError, match="no video is open"):
        Client(chat.url, verbose=False).predict("What appears first?", api_name="/ask")
    path = tmp_path / "notes.mp4"
    path.write_text("nothing that moves")
    with pytest.raises(AppError, match=r"notes\.mp4"):
        client.predict(handle_file(path), api_name="/watch")


def test_only_the_two_endpoints_are_offered(client):
    offered = client.view_api(return_format="dict", print_info=False)["named_endpoints"]

    assert [*offered] == ["/watch", "/ask"]
    names = [parameter["parameter_name"] for parameter in offered["/watch"]["parameters"]]
    assert names == ["video", "start", "end", "fps", "max_frames", "sampling", "attention", "tau"]
    assert [parameter["parameter_has_default"] for parameter in offered["/watch"]["parameters"][1:]] == [True] * 7


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (str(SAMPLE), ""),  # Gradio says no more than that
        ("/etc/passwd", ""),
        ("http://example.com/film.mp4", "addresses are not opened"),
        ("file:///etc/passwd", ""),
    ],
)
def test_files_that_were_not_uploaded_are_refused(chat, path, told):
    video = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [video, "", "", 1, 768, "uniform", "rr", 0.95], "session_hash": "somebody"}
    call = f"{chat.url}gradio_api/call/watch"
    event = httpx.post(call, json=body).json()["event_id"]
    reply = httpx.get(f"{call}/{event}", timeout=20).text

    assert reply.startswith("event: error")
    assert told in reply
    assert "passwd" not in reply


@pytest.mark.parametrize("page", ["gradio_api/file=/etc/passwd", f"gradio_api/file={SAMPLE}", "monitoring", "video/me"])
def test_the_server_gives_nothing_away(chat, page):
    assert httpx.get(chat.url + page).status_code in (403, 404)


@pytest.mark.parametrize("prefix", ["gradio_api/", ""])
def test_no_program_is_started_on_what_somebody_sends_as_a_recording(chat, prefix, tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    segment = {"remove_segment_start": "0", "remove_segment_end": "1"}
    sent = {"video": ("a.mp4", SAMPLE.read_bytes(), "video/mp4")}

    reply = httpx.post(f"{chat.url}{prefix}process_recording", files=sent, data=segment)
    assert reply.status_code == 403
    assert not (tmp_path / "started").exists()


def test_the_page_counts_nobody_and_keeps_no_history(chat):
    config = httpx.get(chat.url + "config").json()

    assert config["analytics_enabled"] is False
    assert config["run_history"] is False


def test_an_upload_can_be_fetched_by_nobody_and_goes_when_its_owner_does(chat):
    client = Client(chat.url, verbose=False)
    client.predict(handle_file(SAMPLE), api_name="/watch")
    own = chat.visitors.session(client.session_hash).file.path
    (upload,) = (path for path in chat.folder.rglob("*.mp4") if path.samefile(own))
    addresses = [f"{prefix}file{mark}{upload}" for prefix in ("gradio_api/", "") for mark in ("=", "/")]
    for address in addresses:
        assert httpx.get(chat.url + address).status_code == 403

    chat.visitors.leave(client.session_hash)  # as when a tab is closed
    assert not upload.exists()
    client.close()


def test_uploads_lie_in_a_folder_of_their_own_which_goes_with_the_server():
    with served() as running:
        client = Client(running.url, verbose=False)
        client.predict(handle_file(SAMPLE), api_name="/watch")
        uploads = [path for path in running.folder.rglob("*.mp4") if path.is_file()]
        (session,) = [visit.session for visit in running.visitors._visits.values()]
        own = Path(session.file.path)
        assert len(uploads) == 1
        assert own.read_bytes() == uploads[0].read_bytes() == SAMPLE.read_bytes()
        client.close()

    assert not running.folder.exists()
    assert not own.exists()
