"""VideoQA, Video, Chat and Answer, as a script uses them: questions, streams and chats."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from itertools import pairwise, permutations

import pytest

from rrvideo import Evidence, RRConfig, VideoQA, engine
from rrvideo.errors import Cancelled
from rrvideo.video import probe

QUESTION = "What colour is the circle?"
OTHER = "How many scenes are there?"


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, device="cpu")


@pytest.fixture(scope="module")
def clip(eight_seconds):
    return eight_seconds


@pytest.fixture(scope="module")
def video(qa, clip):
    return qa.watch(clip)


def greedy(video, turns, tokens):
    """The answer to a conversation, from the engine alone."""
    watched = video._watched
    ids = watched.generate(watched.checkpoint.question(watched.prefix, turns), max_new_tokens=tokens)
    return watched.checkpoint.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def test_an_answer_says_what_it_rests_on_and_what_it_cost(video):
    answer = video.ask(QUESTION, max_new_tokens=7)
    seconds, usage = answer.timings, answer.usage

    assert answer.text == greedy(video, [QUESTION], 7) != ""
    assert all(0 <= moment.start < moment.end <= 8 and 0 < moment.weight <= 1 for moment in answer.evidence)
    assert all(before.weight >= after.weight for before, after in pairwise(answer.evidence))
    assert min(seconds.decode, seconds.encode, seconds.prefill, seconds.generate) > 0
    assert answer.density == 1  # the prefix is shorter than what pays to be sparse
    assert (usage.frames, usage.answer_tokens) == (8, 7)
    assert usage.visual_tokens == 4 * video.plan.width * video.plan.height // 28**2
    assert usage.prompt_tokens > usage.visual_tokens
    with pytest.raises(FrozenInstanceError):
        answer.text = "something else"


def test_answers_go_into_json_and_back(video):
    answer = video.ask(QUESTION, max_new_tokens=3)
    content = json.loads(json.dumps(answer.to_dict()))

    assert {*content} == {"text", "evidence", "timings", "density", "usage"}
    assert [Evidence(**moment) for moment in content["evidence"]] == answer.evidence
    assert content["usage"] == answer.usage.to_dict()
    assert content["timings"] == answer.timings.to_dict()
    assert json.loads(json.dumps(video.to_dict()))["info"] == probe(video.info.path).to_dict()


def test_a_list_of_questions_is_answered_one_by_one(video):
    answers = video.ask([QUESTION, OTHER, QUESTION], max_new_tokens=8)

    assert [answer.text for answer in answers] == [greedy(video, [each], 8) for each in (QUESTION, OTHER, QUESTION)]
    assert answers[0].text != answers[1].text
    assert answers[0].evidence == answers[2].evidence
    assert video.ask([]) == []


def test_no_answer_depends_on_what_was_asked_before_or_was_broken_off(qa, clip, video):
    """To the last bit: evidence and scores tell what texts may hide."""
    questions = (QUESTION, OTHER, "Describe the video. " * 8)

    def asked(video, question):
        answer = video.ask(question, max_new_tokens=8)
        return answer.text, answer.evidence, video.score(question, ["red", "It is blue."])

    def talk(video):
        chat = video.chat()
        return [(answer.text, answer.evidence) for answer in (chat.ask(each, max_new_tokens=8) for each in questions)]

    expected = {question: asked(qa.watch(clip), question) for question in questions}
    conversation = talk(video)
    assert len({str(answer) for answer in expected.values()}) == 3

    for order in permutations(questions):
        for question in order:
            stream = video.stream(order[0])
            next(stream)
            stream.close()
            assert asked(video, question) == expected[question]
        assert talk(video) == conversation


def test_several_videos_are_open_at_once(qa, clip):
    with qa.watch(clip) as one, qa.watch(clip, start=4.0) as other:
        first, second = one.ask(QUESTION, max_new_tokens=8), other.ask(QUESTION, max_new_tokens=8)
        streams = [one.stream(QUESTION, max_new_tokens=8), other.stream(QUESTION, max_new_tokens=8)]
        for _ in range(3):  # by turns
            for stream in streams:
                next(stream, None)
        found = [stream.finish() for stream in streams]

    assert [answer.text for answer in found] == [first.text, second.text]
    assert [answer.evidence for answer in found] == [first.evidence, second.evidence]
    assert first.evidence != second.evidence


def test_threads_may_watch_and_ask_different_videos_at_once(qa, clip):
    def watch_and_ask(start):
        with qa.watch(clip, start=start) as video:
            return [
                (answer.text, answer.evidence, answer.density, answer.usage, video.score(QUESTION, ["red", "It is"]))
                for answer in video.ask([QUESTION, OTHER] * 3, max_new_tokens=8)
            ]

    starts = (0.0, 2.0, 4.0)
    expected = [watch_and_ask(start) for start in starts]
    together = threading.Barrier(len(starts))

    with ThreadPoolExecutor(len(starts)) as threads:
        found = list(threads.map(lambda start: (together.wait(), watch_and_ask(start))[1], starts))
    assert found == expected
    assert expected[0] != expected[1] != expected[2]


def test_the_scores_of_replies_are_their_probabilities(video):
    watched, tokenizer = video._watched, video._watched.checkpoint.tokenizer
    letters = [token for token in range(len(tokenizer)) if tokenizer.encode(tokenizer.decode(token)) == [token]]
    scores = video.score(QUESTION, [tokenizer.decode(token) for token in letters])
    question = watched.checkpoint.question(watched.prefix, [QUESTION])

    assert 0.2 < sum(map(math.exp, scores)) <= 1.0001
    assert scores == pytest.approx(watched.score(question, [[token] for token in letters]))
    assert tokenizer.eos_token_id in letters  # that an answer ends there is a part of it too
    with pytest.raises(ValueError, match="question must not be empty"):
        video.score(" ", ["red"])


def test_an_answer_can_be_cancelled_and_another_asked(video):
    expected, cancel = video.ask(OTHER, max_new_tokens=6).text, engine.Cancel()
    for begin in (video.stream, video.chat().stream):
        cancel = engine.Cancel()
        stream = begin(QUESTION, max_new_tokens=9, cancel=cancel)
        next(stream)
        cancel.cancel()
        with pytest.raises(Cancelled):
            stream.finish()
    for ask in (video.ask, video.chat().ask):
        with pytest.raises(Cancelled):
            ask(QUESTION, cancel=cancel)
    with pytest.raises(Cancelled):
        video.score(QUESTION, ["red"], cancel=cancel)

    assert video.ask(OTHER, max_new_tokens=6).text == expected


def test_windows_of_a_video_are_scanned(qa, clip):
    scanned = qa.scan(clip, {"red": "Is it red?"}, schema={"red": "yes/no"}, every=4, window=2, start=1.0, fps=2.0)
    windows = list(scanned)

    assert [(window.start, window.end) for window in windows] == [(1, 3), (5, 7)]
    yes, no = qa.watch(clip, start=5.0, end=7.0, fps=2.0).score("Is it red?", ["yes", "no"])
    assert windows[1]["red"].value is (yes > no)


def test_the_pieces_of_a_stream_join_to_the_answer(video):
    stream = video.stream(QUESTION, max_new_tokens=9)
    assert stream.answer is None
    pieces = list(stream)

    assert len(pieces) > 3
    assert "".join(pieces) == stream.answer.text == video.ask(QUESTION, max_new_tokens=9).text
    assert list(stream) == []
    assert stream.finish() is stream.answer


@pytest.mark.parametrize(
    "text", ["Das Wort für 星 ist été 🎬", "\n  indented,\n\n and followed by space  \n", "", "a\ufffdb"], ids=repr
)
def test_a_stream_never_yields_half_a_letter(video, monkeypatch, text):
    tokenizer = video._watched.checkpoint.tokenizer
    ids = tokenizer.encode(text)  # several tokens for each letter that the vocabulary lacks

    def generate(self, ids_of_question, *, max_new_tokens, observer, cancel):
        yield from ids[:max_new_tokens]

    monkeypatch.setattr(engine.Watched, "generate", generate)
    stream = video.stream(QUESTION)
    pieces = list(stream)

    assert "".join(pieces) == stream.answer.text == text.strip()
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces).replace("a\ufffdb", "")
    assert stream.answer.usage.answer_tokens == len(ids)


def test_special_tokens_are_no_part_of_an_answer(video, monkeypatch):
    ids = video._watched.checkpoint.tokenizer.encode("a<|vision_start|> b<|image_pad|>")
    monkeypatch.setattr(engine.Watched, "generate", lambda self, *_, **__: (token for token in ids))

    assert video.ask(QUESTION).text == "a b"


def test_an_answer_cut_within_a_letter_shows_that_something_is_missing(video, monkeypatch):
    ids = video._watched.checkpoint.tokenizer.encode("a 🎬")[:-1]
    monkeypatch.setattr(engine.Watched, "generate", lambda self, *_, **__: (token for token in ids))

    assert video.ask(QUESTION).text == "a \ufffd"


def test_a_stream_that_is_closed_makes_way_for_other_questions(video):
    expected = video.ask(OTHER, max_new_tokens=6).text
    stream = video.stream(QUESTION, max_new_tokens=6)
    next(stream)
    with pytest.raises(RuntimeError, match="unfinished"):
        video.ask(OTHER)
    stream.close()

    assert video.ask(OTHER, max_new_tokens=6).text == expected
    assert stream.answer is None
    with pytest.raises(RuntimeError, match="closed before"):
        stream.finish()


def test_a_stream_that_is_dropped_makes_way_too(video):
    for _ in video.stream(QUESTION, max_new_tokens=6):
        break

    assert video.ask(OTHER, max_new_tokens=6).text == greedy(video, [OTHER], 6)


def test_the_second_turn_of_a_chat_equals_a_fresh_prompt_with_the_history(qa, clip, video):
    chat = video.chat()
    first = chat.ask(QUESTION, max_new_tokens=8)
    video.ask("Something in between?")  # belongs to no chat
    second = "".join(chat.stream(OTHER, max_new_tokens=8))

    afresh = qa.watch(clip)
    assert first.text == greedy(afresh, [QUESTION], 8)
    assert second == greedy(afresh, [QUESTION, first.text, OTHER], 8)
    assert second != greedy(afresh, [OTHER], 8)
    assert chat.turns == [QUESTION, first.text, OTHER, second]


def test_a_turn_that_is_not_finished_is_not_remembered(video):
    chat = video.chat()
    stream = chat.stream(QUESTION)
    next(stream)
    stream.close()

    assert chat.turns == []
    assert chat.ask(OTHER, max_new_tokens=8).text == greedy(video, [OTHER], 8)


@pytest.mark.parametrize("question", ["", " \n"], ids=repr)
def test_an_empty_question_is_refused(video, question):
    for ask in (video.ask, video.stream, video.chat().ask):
        with pytest.raises(ValueError, match="question must not be empty"):
            ask(question)


def test_an_answer_has_room_for_a_word_at_least(video):
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        video.ask(QUESTION, max_new_tokens=0)


def test_attention_and_its_config_reach_the_model(folder, clip):
    config = RRConfig(block_size=16, stride=4, tau=0.3, min_tokens=0)
    sparse = VideoQA.load(folder, device="cpu", config=config).watch(clip).ask(QUESTION, max_new_tokens=2)
    full = VideoQA.load(folder, device="cpu", config=config, attention="full").watch(clip)

    assert sparse.density < 0.95
    assert full.ask(QUESTION, max_new_tokens=2).density == 1


def test_the_embedded_model_needs_no_name():
    qa = VideoQA.load(device="cpu")

    assert qa.checkpoint.family.model_type == "qwen2_vl"
    assert qa.checkpoint.model.num_parameters() < 10e6
