"""Training the embedded model: what it computes is what transformers computes, and it learns."""

from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch

from rrvideo.tiny import batches, sight, train
from rrvideo.tiny.layout import make_tokenizer
from rrvideo.tiny.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, draw_world
from rrvideo.tokens import build_question, patchify


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(batches.corpus(), 1024)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return train.build_model(tokenizer)


def draw_batch(tokenizer, geometry, *, tokens=3000, seed=1):
    """A batch with all kinds of questions that the geometry's form has."""
    source = batches.Batches(tokenizer, SimpleNamespace(value=0), "test", tokens)
    return source.draw(Random(seed), geometry, batches.LEVELS[-1])


GEOMETRIES = [
    batches.Geometry(3, (56, 84), timestamps=True, late=False, form="long"),
    batches.Geometry(2, (84, 56), timestamps=True, late=True, form="choice"),
    batches.Geometry(4, (56, 56), timestamps=False, late=False, form="short"),
    batches.Geometry(10, (56, 56), timestamps=True, late=False, form="chat"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["long", "choice-late", "short-without-timestamps", "chat"])
def test_each_packed_question_gets_the_logits_it_gets_alone_from_transformers(geometry, tokenizer, model, monkeypatch):
    monkeypatch.setattr(train, "degrade", lambda pixels, style: pixels.round().clamp(0, 255).to(torch.uint8))
    batch = draw_batch(tokenizer, geometry)
    prefix, _ = batches.example(tokenizer, geometry, 600.0 if geometry.late else 0.0, geometry.longest)
    length = batch.ids.shape[2]
    positions = torch.cat([prefix.positions, prefix.next_positions(length)], 1)[:, None]
    real = batch.answers != batches.IGNORED
    with torch.no_grad():
        packed = train.answer_logits(model, train.Places(model, tokenizer, geometry, batch), batch)
        pixels = train.degrade(train.draw(batch.frames, geometry.size, batch.style), batch.style)
        for video, question in [(0, 0), (1, 3), (len(batch.ids) - 1, geometry.asked.questions - 1)]:
            ids = torch.cat([batch.prefix_ids, batch.ids[video, question]])[None]
            alone = model(
                input_ids=ids,
                pixel_values_videos=patchify(pixels[video], batches.SPEC),
                video_grid_thw=prefix.grid_thw,
                position_ids=positions,
                mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
            ).logits[0]
            mine = real & (batch.before // length == video * geometry.asked.questions + question)
            assert mine.any()
            expected = alone[len(prefix) + batch.before[mine] % length]
            torch.testing.assert_close(packed[mine], expected, atol=1e-4, rtol=1e-4)


def test_the_answers_that_are_learned_are_the_worlds_own(tokenizer):
    batch = draw_batch(tokenizer, GEOMETRIES[0])
    flat = batch.ids.flatten()
    real = batch.answers != batches.IGNORED
    assert torch.equal(flat[batch.before[real] + 1], batch.answers[real])
    for row in range(GEOMETRIES[0].asked.questions):
        answer = batch.answers[real & (batch.before // batch.ids.shape[2] == row)]
        text = tokenizer.decode(batch.ids[0, row], skip_special_tokens=False)
        asked, _, rest = text.partition("<|im_start|>assistant\n")
        assert rest.startswith(tokenizer.decode(answer)) and answer[-1] == tokenizer.eos_token_id
        assert asked.endswith("<|im_end|>\n")


def test_all_batches_of_a_geometry_have_the_same_sizes(tokenizer):
    for geometry in GEOMETRIES:
        one, other = (draw_batch(tokenizer, geometry, seed=seed) for seed in (1, 2))
        assert [tensor.shape for tensor in one] == [tensor.shape for tensor in other]
        assert one.ids.shape[1:] == (geometry.asked.questions, geometry.asked.length)


@pytest.mark.parametrize("form", ["short", "long", "choice", "chat"])
def test_the_longest_questions_of_a_form_fit_with_all_their_answers(form, tokenizer):
    geometry = batches.Geometry(16, (56, 56), timestamps=True, late=form != "long", form=form)
    for seed in range(12):
        batch = draw_batch(tokenizer, geometry, tokens=6000, seed=seed)
        ends = (batch.ids == tokenizer.eos_token_id).flatten().sum()
        # Each question ends, and each answer.
        assert (batch.answers == tokenizer.eos_token_id).sum() * 2 == ends


def test_a_batch_keeps_its_size_when_its_answers_are_too_long(tokenizer, monkeypatch):
    form = replace(batches.FORMS["long"], answer_length=2)
    monkeypatch.setitem(batches.FORMS, "long", form)
    batch = draw_batch(tokenizer, GEOMETRIES[0])
    assert batch.answers.numel() == batch.before.numel() == 2 * batch.kinds.numel()


def test_only_kinds_of_the_level_are_asked(tokenizer):
    source = batches.Batches(tokenizer, SimpleNamespace(value=0), "test", 1000)
    for level in batches.LEVELS:
        for form in set(level.forms):
            geometry = batches.Geometry(4, (56, 56), timestamps=level.timestamps, late=False, form=form)
            kinds = {batches.SCORES[row] for row in source.draw(Random(0), geometry, level).kinds.tolist()}
            assert {kind.removeprefix("choice ") for kind in kinds} - {"chat"} <= set(level.kinds)
            assert ("chat" in kinds) == (form == "chat")
            assert all(kind.startswith("choice ") == (form == "choice") for kind in kinds)


def test_exact_counts_an_answer_only_if_all_of_its_tokens_are_right(tokenizer):
    batch = draw_batch(tokenizer, GEOMETRIES[0])
    real = batch.answers != batches.IGNORED
    right = torch.nn.functional.one_hot(batch.answers.clamp(min=0), len(tokenizer)).float()
    assert train.exact(right, batch).all()
    wrong = right.clone()
    second = int(real.nonzero()[1])  # one token of the first question
    wrong[second] = wrong[second].roll(1)
    assert train.exact(wrong, batch).sum() == batch.kinds.numel() - 1


def test_the_loss_falls_on_a_batch_that_is_seen_again(tokenizer):
    torch.manual_seed(0)
    model = train.build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = train.Trainer(model, tokenizer, optimizer)
    batch = draw_batch(tokenizer, GEOMETRIES[2], tokens=150)
    losses = []
    for _ in range(6):
        trainer.step(GEOMETRIES[2], batch)
        losses.append(trainer.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.scores[1].sum() == 6 * 2 * batch.kinds.numel()  # by kind, and by length


def test_a_pair_of_frames_is_named_by_what_it_shows():
    torch.manual_seed(0)
    frames, shares = sight.pairs_of_frames(400)
    colour, shape, background, direction = shares.split((8, 4, 4, 4), -1)
    for table, shown, columns in ((COLOURS, colour, slice(0, 3)), (BACKGROUNDS, background, slice(3, 6))):
        palette = torch.tensor(list(table.values()), dtype=torch.float32)
        drawn = (frames[:, :, None, columns] == palette).all(-1).float()  # [pairs, 2, colours]
        assert torch.equal(drawn.mean(1), shown)
    assert torch.equal(torch.nn.functional.one_hot(frames[..., 6].long(), 4).float().mean(1), shape)
    same = direction.sum(-1) == 1
    assert 0.7 < same.float().mean() < 0.9 and (direction.sum(-1)[~same] == 0).all()
    # Most pairs move the way they say; where a shape starts again, it jumps back.
    moved = frames[same, 1, 7:9] - frames[same, 0, 7:9]
    way = direction[same] @ torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]])
    along, across = (moved * way).sum(-1), (moved * way.flip(-1)).sum(-1)
    assert (along > 0).float().mean() > 0.8 and across.abs().max() < 1e-6


def test_the_tower_learns_to_be_the_sum_of_its_words(tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = train.build_model(tokenizer)
    before = {name: weight.clone() for name, weight in model.model.language_model.named_parameters()}
    frames, shares = sight.pairs_of_frames(8)
    monkeypatch.setattr(sight, "pairs_of_frames", lambda: (frames, shares))
    monkeypatch.setattr(sight, "SIZES", ((56, 56),))
    sight.pretrain_vision(model, tokenizer, torch.device("cpu"), 80, 2e-3, Random(0))
    words = sight.word_embeddings(model, tokenizer, [*COLOURS, *SHAPES, *BACKGROUNDS, *DIRECTIONS])
    pixels = sight.draw(frames, (56, 56), torch.tensor([1.0, 1.0, 0.0, 0.0])).round().to(torch.uint8).flatten(0, 1)
    grid = torch.tensor([batches.SPEC.grid(16, 56, 56)])
    with torch.no_grad():
        features = model.model.visual(patchify(pixels, batches.SPEC), grid_thw=grid).pooler_output
    meant = (shares @ words).repeat_interleave(4, 0)
    assert torch.nn.functional.cosine_similarity(features, meant).mean() > 0.8
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.language_model.named_parameters())


def test_a_chat_is_what_the_pipeline_would_ask_turn_by_turn(tokenizer):
    geometry = GEOMETRIES[3]
    batch = draw_batch(tokenizer, geometry)
    prefix, _ = batches.example(tokenizer, geometry, 0.0, geometry.longest)
    ids = batch.ids[0, 0]
    turns = tokenizer.decode(ids).split("<|endoftext|>")[0].removesuffix("<|im_end|>").split("<|im_end|>\n")
    said = [turn.split("\n", 1)[1] if turn.startswith("<|im_start|>") else turn for turn in turns]
    assert len(said) == 6
    expected = build_question(tokenizer, prefix, said[:-1])
    answer = tokenizer.encode(said[-1], add_special_tokens=False)
    whole = [*expected.tolist(), *answer, tokenizer.eos_token_id]
    assert ids[: len(whole)].tolist() == whole and not ids[len(whole) :].any()


def test_a_scene_is_made_short_and_the_others_fill_the_video():
    for seed in range(20):
        before = draw_world(Random(seed), 100, 2 + seed % 5)
        after = batches.with_a_short_scene(before, Random(seed), 0.5)
        assert min(scene.end - scene.start for scene in after.scenes) == pytest.approx(0.5)
        assert [scene.name for scene in after.scenes] == [scene.name for scene in before.scenes]
        borders = [time for scene in after.scenes for time in (scene.start, scene.end)]
        assert borders == sorted(borders) and borders[1:-1:2] == borders[2::2]
        assert (borders[0], borders[-1]) == (before.scenes[0].start, before.scenes[-1].end)
