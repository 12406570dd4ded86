"""Videos on disk: what comes back is what was saved, or an error that says why not."""

import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import FAMILIES
from clips import number_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rrvideo import ModelError, RRConfig, RRVideoError, VideoError, VideoQA, store
from rrvideo.video import read_frames

QUESTION = "What colour is the circle?"
OTHERS = ["How many scenes are there?", "Describe the video. " * 8]
SPARSE = RRConfig(block_size=16, stride=4, tau=0.5, min_tokens=0)


@pytest.fixture(scope="module")
def qa(folder):
    return VideoQA.load(folder, device="cpu", config=SPARSE)


@pytest.fixture(scope="module")
def clip(eight_seconds):
    return eight_seconds


@pytest.fixture(scope="module")
def video(qa, clip):
    return qa.watch(clip)


@pytest.fixture(scope="module")
def saved(video, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "clip.rrvideo"
    video.save(path)
    return path


def answers(video):
    """What the model answers, to several questions and in a chat, with all that shows a difference in the last bit."""
    chat = video.chat()
    given = video.ask([QUESTION, *OTHERS], max_new_tokens=8) + [chat.ask(each, max_new_tokens=8) for each in OTHERS]
    scores = [tuple(video.score(each, ["red", "It is red."])) for each in (QUESTION, *OTHERS)]
    return scores, [(answer.text, answer.evidence, answer.density, answer.usage) for answer in given]


def contents(path):
    """The tensors of a saved video and its record, read with safetensors alone."""
    with safe_open(path, "pt") as opened:
        return load_file(path), json.loads(opened.metadata()["rrvideo"])


@pytest.mark.parametrize(("family", "cache"), [*((family, "device") for family in FAMILIES), ("qwen2_vl", "offload")])
def test_an_opened_video_answers_as_the_saved_one_to_the_last_bit(folders, clip, tmp_path, family, cache):
    qa = VideoQA.load(folders[family], device="cpu", config=SPARSE)
    video = qa.watch(clip, cache=cache)
    expected = answers(video)
    video.save(tmp_path / "clip.rrvideo")
    again = VideoQA.load(folders[family], device="cpu", config=SPARSE)

    with again.open(tmp_path / "clip.rrvideo", cache=cache) as opened:
        assert answers(opened) == expected
        assert opened.ask(QUESTION).timings.prefill == video.ask(QUESTION).timings.prefill
    assert len({*expected[0]}) == 3
    assert 0.1 < video.ask(QUESTION).density < 0.95  # the prefill was sparse, and is not done again in another way


def test_all_that_is_known_of_the_video_comes_back(qa, video, saved):
    opened = qa.open(saved)

    assert opened.to_dict() == video.to_dict()
    assert opened.plan == video.plan
    assert opened.info == video.info
    with pytest.raises(ValueError, match="cache must be 'device' or 'offload', got 'disk'"):
        qa.open(saved, cache="disk")
    found = [number_of(frame.image) for frame in read_frames(opened.plan)]
    assert found == [number_of(frame.image) for frame in read_frames(video.plan)]
    assert len(found) == 8


def test_the_file_is_one_of_safetensors_and_json(video, saved):
    tensors, record = contents(saved)
    prefix, layers = video._watched.prefix, video._watched.cache.layers

    for number, layer in enumerate(layers):
        assert torch.equal(tensors[f"keys.{number}"], layer.keys[:, :, : len(prefix)])
        assert torch.equal(tensors[f"values.{number}"], layer.values[:, :, : len(prefix)])
    for name in ("input_ids", "positions", "step", "grid_thw"):
        assert torch.equal(tensors[f"prefix.{name}"], getattr(prefix, name))
    assert record["prefix"]["times"] == [*prefix.times]
    assert record["model"]["attention"]["config"]["tau"] == 0.5


def test_saving_what_was_opened_or_in_the_middle_of_an_answer_writes_the_same(qa, video, saved, tmp_path):
    qa.open(saved).save(tmp_path / "again")
    stream = video.stream(QUESTION)
    next(stream)
    video.save(tmp_path / "meanwhile")
    stream.close()

    tensors, record = contents(saved)
    for name in ("again", "meanwhile"):
        others, other_record = contents(tmp_path / name)
        assert other_record == record
        assert others.keys() == tensors.keys()
        assert all(torch.equal(others[key], tensors[key]) for key in tensors)


def test_what_is_opened_no_longer_depends_on_its_file(qa, video, saved, tmp_path):
    copy = shutil.copy(saved, tmp_path / "copy")
    opened = qa.open(copy)
    copy.write_bytes(b"\xff" * saved.stat().st_size)

    assert answers(opened) == answers(video)
    assert [frame.index for frame in read_frames(opened.plan)] == [*video.plan.indices]


def test_the_video_may_be_gone_but_not_have_changed(qa, clip, tmp_path):
    copy = shutil.copyfile(clip, tmp_path / "copy.mp4")
    video = qa.watch(copy)
    video.save(tmp_path / "saved")
    expected = answers(video)
    copy.touch()  # another date is no change
    assert qa.open(tmp_path / "saved").warnings == ()

    content = bytearray(clip.read_bytes())
    content[-1] ^= 1
    for other in (content, content[:-1]):
        copy.write_bytes(other)
        with pytest.raises(
            VideoError, match=r"copy\.mp4 has changed since it was watched, and saved is of what it was"
        ):
            qa.open(tmp_path / "saved")

    copy.unlink()
    assert answers(qa.open(tmp_path / "saved")) == expected


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_long_file_has_changed_where_either_end_has(tmp_path, place):
    content = bytearray(3 * store.MIB)
    path = tmp_path / "long.mp4"
    path.write_bytes(content)
    mark = store.FileMark.of(path)
    assert not mark.has_changed

    content[place] = 1
    path.write_bytes(content)
    assert mark.has_changed


def test_what_was_lost_in_watching_is_told_again(qa, clip, tmp_path):
    content = bytearray(clip.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (tmp_path / "damaged.mp4").write_bytes(content)
    video = qa.watch(tmp_path / "damaged.mp4")
    video.save(tmp_path / "saved")

    assert video.warnings != ()
    assert qa.open(tmp_path / "saved").warnings == video.warnings


def changed_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))  # as merging an adapter does
    weights[name] *= 1.001
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def changed_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(config))


def changed_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "helper"))


@pytest.mark.parametrize("change", [changed_weights, changed_config, changed_template])
def test_another_model_is_refused(folder, saved, tmp_path, change):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "README.md").write_text("What a folder is called and says of itself makes no other model of it.")
    (other / "weights.json").write_text("[[1.0]]")
    VideoQA.load(other, device="cpu", config=SPARSE).open(saved).close()
    change(other)

    with pytest.raises(ModelError, match=r"clip\.rrvideo was watched by .*qwen2_vl.*, and .*other hold another model"):
        VideoQA.load(other, device="cpu", config=SPARSE).open(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "was watched in float32, and .* is loaded in bfloat16 .*dtype='float32'"),
        ({"attention": "full"}, "with other attention .*attention='rr'"),
        ({"config": RRConfig(tau=0.9)}, "with other attention .*'tau': 0.5"),
    ],
    ids=["dtype", "attention", "config"],
)
def test_the_same_model_loaded_in_another_way_is_refused(folder, saved, changes, message):
    other = VideoQA.load(folder, **{"device": "cpu", "config": SPARSE} | changes)

    with pytest.raises(ModelError, match=message):
        other.open(saved)


def test_weights_of_heads_are_asked_for_without_a_list_of_them(qa, clip, tmp_path):
    text = qa.checkpoint.model.config.get_text_config()
    weights = [[1.5, *[0.9] * (text.num_attention_heads - 1)]] * text.num_hidden_layers
    weighted = qa.attending("rr", replace(SPARSE, head_weights=weights))
    with weighted.watch(clip) as video:
        video.save(tmp_path / "weighted")
    weighted.open(tmp_path / "weighted").close()

    with pytest.raises(
        ModelError, match=r"'tau': 0\.5.*\}\), and the head_weights that it was watched with"
    ) as refused:
        qa.open(tmp_path / "weighted")
    assert "0.9" not in str(refused.value)


@pytest.mark.parametrize("content", [b"my film", b"", bytes(8), b"\x08" + bytes(7) + b'{"a": 1}', b"\xff" * 99])
def test_only_a_saved_video_is_replaced(video, clip, tmp_path, content):
    target = tmp_path / "precious"
    target.write_bytes(content)
    if content:
        with pytest.raises(RRVideoError, match="precious is there, and it is no saved video"):
            video.save(target)
        assert target.read_bytes() == content
        target.unlink()
    video.save(target)
    before = target.read_bytes()
    target.write_bytes(before[:-9])
    video.save(target)
    assert len(target.read_bytes()) == len(before)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_no_video(qa, saved, tmp_path, share):
    content = saved.read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(share * len(content))])

    with pytest.raises(VideoError, match=r"cut is no saved video, or it is damaged.*watch the video again"):
        qa.open(tmp_path / "cut")


def test_not_one_byte_may_be_another(qa, saved, tmp_path):
    content = saved.read_bytes()
    for place in range(0, len(content), len(content) // 60):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(RRVideoError):
            qa.open(tmp_path / "flipped")


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "is no saved video"), ("config.json", "is no saved video"), ("missing", "there is no file")],
)
def test_other_files_are_no_saved_videos(qa, folder, name, message):
    with pytest.raises(VideoError, match=message):
        qa.open(folder / name)


def test_a_file_of_another_format_names_the_version_that_wrote_it(qa, video, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(store, "FORMAT", store.FORMAT + 1)
        patched.setattr(store, "version", lambda package: "7.1")
        video.save(tmp_path / "later")

    with pytest.raises(VideoError, match=r"saved by rrvideo 7\.1, in another format"):
        qa.open(tmp_path / "later")


def test_a_full_disk_leaves_what_was_there_before(qa, video, saved, tmp_path):
    shutil.copyfile(saved, tmp_path / "clip.rrvideo")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (saved.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(RRVideoError, match=r"clip\.rrvideo cannot be written: .*too large"):
            video.save(tmp_path / "clip.rrvideo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert [path.name for path in tmp_path.iterdir()] == ["clip.rrvideo"]
    assert answers(qa.open(tmp_path / "clip.rrvideo")) == answers(video)


def test_nothing_can_be_written_into_a_folder_that_is_not_there(video, tmp_path):
    with pytest.raises(RRVideoError, match=r"cannot be written: .*No such file"):
        video.save(tmp_path / "missing" / "clip.rrvideo")


def test_until_all_is_written_nothing_is_there(video, tmp_path, monkeypatch):
    def interrupt(tensors, path, **_):
        path.write_bytes(b"half of it")
        assert not (tmp_path / "clip.rrvideo").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.save(tmp_path / "clip.rrvideo")
    assert [*tmp_path.iterdir()] == []


def test_a_closed_video_is_not_saved(qa, clip, tmp_path):
    with qa.watch(clip) as video:
        pass
    with pytest.raises(RuntimeError, match="the video is closed"):
        video.save(tmp_path / "clip.rrvideo")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["device", "offload"])
def test_what_a_gpu_has_seen_a_cpu_can_be_asked(folder, clip, tmp_path, cache):
    there = VideoQA.load(folder, device="cuda", dtype="float32", config=SPARSE).watch(clip, cache=cache)
    there.save(tmp_path / "clip.rrvideo")
    here = VideoQA.load(folder, device="cpu", config=SPARSE).open(tmp_path / "clip.rrvideo")
    back = VideoQA.load(folder, device="cuda", dtype="float32", config=SPARSE).open(
        tmp_path / "clip.rrvideo", cache=cache
    )

    assert answers(back) == answers(there)
    for one, other in zip(there._watched.cache.layers, here._watched.cache.layers, strict=True):
        assert torch.equal(one.keys.cpu(), other.keys)
    assert here.ask(QUESTION, max_new_tokens=4).text == there.ask(QUESTION, max_new_tokens=4).text
