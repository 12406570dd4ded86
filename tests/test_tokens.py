"""Patches, prompts and positions against the Hugging Face processor and model."""

import numpy as np
import pytest
import torch
from checkpoints import MODEL_CLASSES, PLACEHOLDER, make_checkpoint, processed
from transformers import AutoProcessor

from rrvideo import families, tokens
from rrvideo.errors import ModelError

QUESTION = "What colour is the circle?"
SPEC = tokens.PatchSpec()
SECONDS_PER_STEP = 4.0
SHAPES = [(1, 2, 2), (2, 1, 4), (7, 3, 2), (12, 4, 3), (9, 1, 1)]  # frames, rows and columns of visual tokens
in_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
# Qwen3-VL's own prompt has the times in any case.
LAYOUTS = [("qwen2_vl", False), ("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", True)]
in_every_layout = pytest.mark.parametrize(("family", "timestamps"), LAYOUTS)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Per family: the processor and the model of transformers, from the same folder."""
    loaded = {}
    for family, model_class in MODEL_CLASSES.items():
        folder = make_checkpoint(tmp_path_factory.mktemp(family), family)
        loaded[family] = AutoProcessor.from_pretrained(folder), model_class.from_pretrained(folder)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(processors):
    return processors["qwen2_vl"][0].tokenizer


def random_frames(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def frame_times(count):
    return [7.0 + i * SECONDS_PER_STEP / 2 for i in range(count)]


def sized(family, shape):
    """A shape in frames and visual tokens as one in frames and pixels."""
    factor = families.FAMILIES[family].spec.factor
    return shape[0], shape[1] * factor, shape[2] * factor


def prefix_for(tokenizer, family, times, size, *, timestamps, **options):
    """The prefix as a checkpoint of the family lays it out."""
    rules = families.FAMILIES[family]
    options |= {"label": rules.label, "part_steps": rules.parts_steps, "timestamps": timestamps}
    return tokens.build_prefix(tokenizer, rules.spec, times, size, **options)


@in_every_shape
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_patches_equal_those_of_the_processor(processors, family, shape):
    spec, shape = families.FAMILIES[family].spec, sized(family, shape)
    frames = random_frames(*shape)
    expected = processed(processors[family][0], frames, frame_times(len(frames)), QUESTION, timestamps=False)

    assert torch.equal(tokens.patchify(frames, spec), expected.pixel_values_videos)
    assert expected.video_grid_thw.tolist() == [list(spec.grid(*shape))]


def test_frames_cut_a_few_at_a_time_give_the_same_patches_as_all_at_once():
    frames = random_frames(11, 56, 84)
    parts = [tokens.patchify(frames[i : i + 4], SPEC) for i in range(0, 11, 4)]

    assert torch.equal(torch.cat(parts), tokens.patchify(frames, SPEC))


def test_patches_follow_what_the_processor_config_says(processors):
    changed = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 128}
    spec = SPEC.updated({**changed, "patch_size": 7, "merge_size": 4, "processor_class": "other"})
    frames = random_frames(3, 56, 84)
    expected = processors["qwen2_vl"][0].video_processor(
        videos=[frames],
        do_resize=False,
        cap_pixels_per_frame=False,
        patch_size=7,
        merge_size=4,
        return_tensors="pt",
        **changed,
    )

    assert torch.equal(tokens.patchify(frames, spec), expected["pixel_values_videos"])
    assert spec.updated({"patch_size": None}) == spec


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 56, 60, 3), np.uint8),
        np.zeros((2, 3, 56, 56), np.uint8),
        np.zeros((2, 56, 56, 3), np.float32),
        np.zeros((0, 56, 56, 3), np.uint8),
    ],
    ids=["sides", "channels-first", "float", "no-frames"],
)
def test_frames_of_another_shape_or_type_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be|sides of frames"):
        tokens.patchify(frames, SPEC)


@in_every_shape
@in_every_layout
def test_prompt_tokens_and_grids_equal_those_of_the_processor(processors, family, timestamps, shape):
    processor, _ = processors[family]
    count, *size = sized(family, shape)
    expected = processed(processor, random_frames(count, *size), frame_times(count), QUESTION, timestamps=timestamps)
    prefix = prefix_for(processor.tokenizer, family, frame_times(count), size, timestamps=timestamps)
    question = tokens.build_question(processor.tokenizer, prefix, [QUESTION])

    # Both parts together are the whole as the processor tokenised it at once.
    assert torch.equal(torch.cat([prefix.input_ids, question]), expected.input_ids[0])
    grid = expected.video_grid_thw
    if family == "qwen3_vl":  # whose processor gives one row for all steps, and whose model parts them later
        assert set(prefix.grid_thw[:, 0].tolist()) == {1}
        grid = torch.cat([torch.ones(len(prefix.grid_thw), 1), grid[:, 1:].expand(grid[0, 0], -1)], dim=1)
    assert torch.equal(prefix.grid_thw, grid)
    assert torch.equal(prefix.visual, expected.mm_token_type_ids[0, : len(prefix)] == 2)
    assert prefix.times == tuple(frame_times(count)[::2])


@pytest.mark.parametrize("timestamps", [False, True], ids=["one-segment", "timestamps"])
def test_every_visual_token_knows_its_temporal_step(tokenizer, timestamps):
    prefix = tokens.build_prefix(tokenizer, SPEC, frame_times(7), (56, 84), timestamps=timestamps)

    assert prefix.step[prefix.visual].tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert set(prefix.step[~prefix.visual].tolist()) == {-1}
    pads = prefix.input_ids == tokenizer.convert_tokens_to_ids(tokens.VIDEO_PAD)
    assert torch.equal(pads, prefix.visual)


def test_times_are_written_before_their_steps(tokenizer):
    prefix = tokens.build_prefix(tokenizer, SPEC, [59.9, 60.4, 3725.5, 3726.0], (28, 28), timestamps=True)

    written = tokenizer.decode(prefix.input_ids).split("<|im_start|>user\n")[1]
    assert written == f"0:59{PLACEHOLDER}1:02:05{PLACEHOLDER}"


@pytest.mark.parametrize("times", [[0.25, 0.75, 1.3, 1.9], [12.0, 12.5, 13.0]], ids=["even", "odd"])
def test_qwen3_reads_the_mean_time_of_each_step_before_it(tokenizer, times):
    written, silent = (
        prefix_for(tokenizer, "qwen3_vl", times, (32, 32), timestamps=timestamps) for timestamps in (True, False)
    )
    text = tokenizer.decode(written.input_ids).split("<|im_start|>user\n")[1]

    labels = {4: ["<0.5 seconds>", "<1.6 seconds>"], 3: ["<12.2 seconds>", "<13.0 seconds>"]}[len(times)]
    assert text == "".join(label + PLACEHOLDER for label in labels)
    # Without the times, the steps are segments still, as the model parts them.
    assert tokenizer.decode(silent.input_ids).endswith("<|im_start|>user\n" + PLACEHOLDER * 2)
    assert torch.equal(silent.grid_thw, written.grid_thw)


@pytest.mark.parametrize(("family", "timestamps"), [*LAYOUTS, ("qwen3_vl", False)])
def test_the_first_steps_of_a_video_are_laid_out_as_they_are_in_the_whole_video(tokenizer, family, timestamps):
    options = {"timestamps": timestamps, "tokens_per_second": 2.0 if family == "qwen2_5_vl" else None}
    size = (64, 96) if family == "qwen3_vl" else (56, 84)
    times = [0.0, 0.9, 2.04, 3.3, 7.7, 8.0, 12.0, 13.1, 13.2]
    whole = prefix_for(tokenizer, family, times, size, **options)

    for frames in (2, 4, 8):
        part = prefix_for(tokenizer, family, times[:frames], size, **options)
        one_segment = len(whole.grid_thw) == 1
        length = len(part) - one_segment  # without the end of a segment that goes on
        assert torch.equal(part.input_ids[:length], whole.input_ids[:length])
        assert torch.equal(part.step[:length], whole.step[:length])
        assert torch.equal(part.positions[:, :length], whole.positions[:, :length])
        assert int(part.visual.nonzero()[-1]) == len(part) - 2


@in_every_shape
@in_every_layout
def test_positions_equal_those_of_the_model(processors, family, timestamps, shape):
    processor, model = processors[family]
    count, *size = sized(family, shape)
    inputs = processed(processor, random_frames(count, *size), frame_times(count), QUESTION, timestamps=timestamps)
    options, rate = {}, None
    if family == "qwen2_5_vl":
        rate = model.config.vision_config.tokens_per_second
        options["second_per_grid_ts"] = torch.full((len(inputs.video_grid_thw),), SECONDS_PER_STEP)
    expected, _ = model.model.get_rope_index(
        inputs.input_ids,
        mm_token_type_ids=inputs.mm_token_type_ids,
        video_grid_thw=inputs.video_grid_thw,
        **options,
    )
    prefix = prefix_for(
        processor.tokenizer, family, frame_times(count), size, timestamps=timestamps, tokens_per_second=rate
    )
    after = prefix.next_positions(inputs.input_ids.shape[1] - len(prefix))
    ours = torch.cat([prefix.positions, after], dim=1)

    end = len(prefix) - 1  # of the visual tokens
    assert torch.equal(ours[:, :end], expected[:, 0, :end])
    # transformers 5 lets the text after a long segment start inside of that segment's time, where transformers 4, the
    # paper and we go on after it; everything after the video is off by one and the same distance.
    assert (ours - expected[:, 0])[:, end:].unique().numel() == 1
    assert ours[0, end] == ours[:, :end].max() + 1
    if timestamps:
        assert torch.equal(ours, expected[:, 0])


def test_steps_that_are_not_evenly_spaced_keep_their_times(processors):
    """Each stands where the model puts the second step of a video whose steps are that far apart."""
    processor, model = processors["qwen2_5_vl"]
    times = [3.0, 4.0, 5.5, 6.0, 15.0, 15.2, 16.0, 17.0, 40.0]
    prefix = tokens.build_prefix(processor.tokenizer, SPEC, times, (56, 84), timestamps=False, tokens_per_second=2.0)
    two = processed(processor, random_frames(4, 56, 84), times[:4], QUESTION, timestamps=False)

    for step in range(1, 5):
        expected, _ = model.model.get_rope_index(
            two.input_ids,
            mm_token_type_ids=two.mm_token_type_ids,
            video_grid_thw=two.video_grid_thw,
            second_per_grid_ts=torch.tensor([times[2 * step] - times[0]]),
        )
        second = expected[:, 0, two.mm_token_type_ids[0] == 2][:, 6:]
        assert torch.equal(prefix.positions[:, prefix.step == step], second)


@pytest.mark.parametrize("rate", [None, 2.0, 25.0])
def test_positions_follow_the_rule_of_the_paper_over_segments_of_any_size(rate):
    grids = [(3, 4, 8), (1, 2, 2), (12, 2, 4), (1, 10, 4)]
    times = [0.0, 1.9999, 4.5, 10.0, *(20.0 + 0.7 * i for i in range(12)), 40.0]
    visual: list[bool] = []
    expected: list[tuple[int, int, int]] = []
    step = 0
    for steps, rows, columns in grids:
        for _ in range(3):
            following = max(max(place) for place in expected) + 1 if expected else 0
            expected.append((following,) * 3)
            visual.append(False)
        start = expected[-1][0] + 1
        for t in range(steps):
            # 1.9999 s is 2 s, as a container with a coarse clock tells it
            time = t if rate is None else int((round(times[step + t], 2) - times[step]) * rate + 1e-9)
            for row in range(rows // 2):
                for column in range(columns // 2):
                    expected.append((start + time, start + row, start + column))
                    visual.append(True)
        step += steps

    positions = tokens.mrope_positions(
        torch.tensor(visual),
        torch.tensor(grids),
        merge_size=2,
        times=times if rate else None,
        tokens_per_second=rate or 0.0,
    )

    assert positions.T.tolist() == [list(place) for place in expected]


def test_a_chat_goes_on_from_what_was_rendered_before(tokenizer):
    prefix = tokens.build_prefix(tokenizer, SPEC, frame_times(4), (56, 56), timestamps=True)
    first = tokens.build_question(tokenizer, prefix, [QUESTION])
    both = tokens.build_question(tokenizer, prefix, [QUESTION, "It is red.", "And the star?"])

    written = f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first) == written
    assert tokenizer.decode(both) == (
        f"{written}It is red.<|im_end|>\n<|im_start|>user\nAnd the star?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert torch.equal(both[: len(first)], first)


def test_a_question_that_spells_the_placeholder_does_not_move_the_video(tokenizer):
    prefix = tokens.build_prefix(tokenizer, SPEC, frame_times(2), (28, 28), timestamps=False)

    question = tokens.build_question(tokenizer, prefix, [f"{PLACEHOLDER} again?"])

    assert tokenizer.decode(question).startswith(f"{PLACEHOLDER} again?")


def test_a_chat_ends_with_the_user(tokenizer):
    prefix = tokens.build_prefix(tokenizer, SPEC, frame_times(2), (28, 28), timestamps=False)

    with pytest.raises(ValueError, match="2 turns"):
        tokens.build_question(tokenizer, prefix, [QUESTION, "It is red."])


def test_a_template_without_a_place_for_a_video_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'][1]['text'] }}")

    with pytest.raises(ModelError, match="no place for a video"):
        tokens.build_prefix(tokenizer, SPEC, frame_times(2), (28, 28), timestamps=False)


def test_a_template_that_changes_what_stands_before_the_video_is_an_error(tokenizer, monkeypatch):
    prefix = tokens.build_prefix(tokenizer, SPEC, frame_times(2), (28, 28), timestamps=False)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }} messages" + tokenizer.chat_template)
    counted = tokens.build_prefix(tokenizer, SPEC, frame_times(2), (28, 28), timestamps=False)

    assert len(tokens.build_question(tokenizer, counted, [QUESTION]))
    for stale, turns in ((prefix, [QUESTION]), (counted, [QUESTION, "Red.", QUESTION])):
        with pytest.raises(ModelError, match="another text before the video"):
            tokens.build_question(tokenizer, stale, turns)


def test_thousands_of_steps_are_laid_out_quickly(tokenizer):
    times = [float(i) for i in range(8000)]
    prefix = tokens.build_prefix(tokenizer, SPEC, times, (56, 84), timestamps=True)

    assert prefix.grid_thw.shape == (4000, 3)
    assert prefix.positions[0].diff().min() >= 0
