"""Training the embedded model: what it computes is what transformers computes, and it learns."""

from random import Random
from types import SimpleNamespace

import pytest
import torch

from rrvideo.tiny import batches, train
from rrvideo.tiny.layout import make_tokenizer
from rrvideo.tokens import patchify


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(batches.corpus(), 1024)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return train.build_model(tokenizer)


def draw_batch(tokenizer, geometry, *, tokens=1000, fixed=False):
    level = SimpleNamespace(value=0)
    return batches.Batches(tokenizer, level, "test", tokens, fixed).draw(Random(1), geometry)


GEOMETRIES = [
    batches.Geometry(3, (56, 84), timestamps=True, late=False, choice=False),
    batches.Geometry(2, (84, 56), timestamps=True, late=True, choice=True),
    batches.Geometry(4, (56, 56), timestamps=False, late=False, choice=False),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["open", "choice-late", "without-timestamps"])
def test_each_packed_question_gets_the_logits_it_gets_alone_from_transformers(geometry, tokenizer, model, monkeypatch):
    monkeypatch.setattr(train, "degrade", lambda pixels, style: pixels.round().clamp(0, 255).to(torch.uint8))
    batch = draw_batch(tokenizer, geometry)
    prefix, _ = batches.example(tokenizer, geometry, 600.0 if geometry.late else 0.0, 2.0 * geometry.steps)
    length = batch.ids.shape[2]
    positions = torch.cat([prefix.positions, prefix.next_positions(length)], 1)[:, None]
    real = batch.answers != batches.IGNORED
    with torch.no_grad():
        packed = train.answer_logits(model, train.Places(model, tokenizer, geometry, batch), batch)
        pixels = train.degrade(train.draw(batch.frames, geometry.size, batch.style), batch.style)
        for video, question in [(0, 0), (1, 3), (len(batch.ids) - 1, batches.QUESTIONS - 1)]:
            ids = torch.cat([batch.prefix_ids, batch.ids[video, question]])[None]
            alone = model(
                input_ids=ids,
                pixel_values_videos=patchify(pixels[video], batches.SPEC),
                video_grid_thw=prefix.grid_thw,
                position_ids=positions,
                mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
            ).logits[0]
            mine = real & (batch.before // length == video * batches.QUESTIONS + question)
            assert mine.any()
            expected = alone[len(prefix) + batch.before[mine] % length]
            torch.testing.assert_close(packed[mine], expected, atol=1e-4, rtol=1e-4)


def test_the_answers_that_are_learned_are_the_worlds_own(tokenizer):
    batch = draw_batch(tokenizer, GEOMETRIES[0])
    flat = batch.ids.flatten()
    real = batch.answers != batches.IGNORED
    assert torch.equal(flat[batch.before[real] + 1], batch.answers[real])
    for row in range(batches.QUESTIONS):
        answer = batch.answers[real & (batch.before // batch.ids.shape[2] == row)]
        text = tokenizer.decode(batch.ids[0, row], skip_special_tokens=False)
        asked, _, rest = text.partition("<|im_start|>assistant\n")
        assert rest.startswith(tokenizer.decode(answer)) and answer[-1] == tokenizer.eos_token_id
        assert asked.endswith("<|im_end|>\n")


def test_a_fixed_batch_has_the_sizes_of_its_geometry(tokenizer):
    for geometry in GEOMETRIES:
        batch = draw_batch(tokenizer, geometry, fixed=True)
        assert batch.ids.shape[1:] == (batches.QUESTIONS, geometry.length)
        assert batch.answers.shape == batch.before.shape == (batch.kinds.numel() * batches.ANSWER_LENGTH,)


@pytest.mark.parametrize("choice", [False, True], ids=["open", "choice"])
def test_the_longest_questions_fit_into_a_fixed_batch(choice, tokenizer):
    geometry = batches.Geometry(16, (56, 56), timestamps=True, late=True, choice=choice)
    source = batches.Batches(tokenizer, SimpleNamespace(value=0), "test", 6000, fixed=True)
    for seed in range(12):
        batch = source.draw(Random(seed), geometry)
        assert batch.ids.shape[2] == geometry.length
        assert batch.answers.numel() == batch.kinds.numel() * batches.ANSWER_LENGTH


def test_a_fixed_batch_keeps_its_size_when_its_answers_are_too_long(tokenizer, monkeypatch):
    monkeypatch.setattr(batches, "ANSWER_LENGTH", 2)
    batch = draw_batch(tokenizer, GEOMETRIES[0], fixed=True)
    assert batch.answers.numel() == batch.before.numel() == 2 * batch.kinds.numel()


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
    batch = draw_batch(tokenizer, GEOMETRIES[2])
    losses = []
    for _ in range(12):
        trainer.step(GEOMETRIES[2], batch)
        losses.append(trainer.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.scores[1].sum() == 12 * 2 * batch.kinds.numel()  # by kind, and by length
