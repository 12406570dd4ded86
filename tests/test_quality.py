"""The quality benchmark: other ways to choose blocks, what real models lose by them, and how they are compared."""

import itertools
import json
import math
from argparse import ArgumentParser, Namespace
from xml.etree import ElementTree

import pytest
import torch
from benching import SMALL, generated, grid_of, room
from checkpoints import CORPUS, make_checkpoint
from transformers import AutoTokenizer

from rrattention import BlockGrid, RRConfig, dense_attention, estimate
from rrvideo import VideoQA, cli


def test_block_mass_is_what_sampling_every_query_and_pooling_nothing_gives():
    inputs = generated(200)
    config = RRConfig(block_size=16, stride=1)
    expected = estimate(inputs.q, inputs.k, config=config, backend="reference")
    found = room("baselines").block_mass(inputs.q, inputs.k, grid_of(inputs, config), scale=inputs.scale)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_antidiagonal_scores_equal_a_loop_over_tiles():
    inputs, stride, size = generated(70, heads=2, kv_heads=1), 4, 16
    found = room("baselines").antidiagonal_scores(
        inputs.q, inputs.k, grid_of(inputs, SMALL), scale=inputs.scale, stride=stride
    )
    q = torch.nn.functional.pad(inputs.q[0], (0, 0, 0, 10))
    k = torch.nn.functional.pad(inputs.k[0, 0], (0, 0, 0, 10))
    expected = torch.zeros(2, 5, 5)
    for h, a in itertools.product(range(2), range(18)):  # the last tile holds rows 68 and 69
        logits = [
            sum(float(q[h, a * stride + stride - 1 - i] @ k[b * stride + i]) for i in range(stride)) / stride
            for b in range(a + 1)
        ]
        for b, mass in enumerate(torch.softmax(inputs.scale * torch.tensor(logits), dim=0)):
            expected[h, a * stride // size, b * stride // size] += mass

    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_flexprefill_keeps_the_column_and_the_distance_that_the_last_queries_look_at():
    torch.manual_seed(0)
    length, dim, size = 160, 256, 16
    q, k = torch.zeros(1, 2, length, dim), torch.zeros(1, 2, length, dim)
    q[0, 0, :, 0], k[0, 0, 32:48, 0] = 1.0, 20.0  # head 0: all look at block 2, and no two keys of it alike
    places = torch.eye(length)
    q[0, 1, 48:, :length], k[0, 1, :-48, :length] = 20.0 * places[:-48], places[:-48]  # head 1: 48 tokens back
    config = RRConfig(size, 4, tau=0.9, dense_last_block=False)
    grid = BlockGrid.of(q, length, length, config)
    kept = room("baselines").flexprefill(q, k, grid, config, 1.0).mask()[0]

    for m in range(3, 10):
        assert kept[0, m].nonzero().flatten().tolist() == sorted({0, 2, m})
        assert kept[1, m, m - 3], "the diagonal of tiles 48 tokens back"
    assert not kept[1, 8, [1, 2, 3]].any()


def test_flexprefill_believes_pooled_scores_where_the_last_queries_agree_with_them():
    q, k = torch.zeros(1, 1, 160, 8), torch.zeros(1, 1, 160, 8)  # uniform attention
    config = RRConfig(16, 4, tau=0.5, dense_last_block=False)
    grid = BlockGrid.of(q, 160, 160, config)
    kept = room("baselines").flexprefill(q, k, grid, config, 1.0).mask()[0, 0]

    assert kept[:3].sum() == 6, "one set for the whole map: the few blocks of early rows carry most"
    assert (kept[9].sum() < 5).item()


def test_random_keeps_as_many_blocks_of_each_row_as_rrattention():
    inputs, baselines = generated(300), room("baselines")
    grid = grid_of(inputs, SMALL)
    drawn = baselines.random_blocks(inputs.q, inputs.k, grid, SMALL, inputs.scale)
    chosen = baselines.rrattention(inputs.q, inputs.k, grid, SMALL, inputs.scale)

    assert torch.equal(drawn.counts, chosen.counts)
    assert not torch.equal(drawn.mask(), chosen.mask())
    assert (drawn.mask() | ~grid.mandatory()[:, None]).all() and not (drawn.mask() & ~grid.visible()[:, None]).any()


def test_no_method_keeps_more_mass_in_as_many_blocks_than_the_oracle_and_random_keeps_least():
    quality, baselines = room("quality"), room("baselines")
    rows = quality.measure([generated(1500, heads=8, head_dim=64)], list(baselines.METHODS), [0.97, 0.9, 0.8, 0.6])
    curves = {
        method: [(row["density"], row["mass"]) for row in rows if row["method"] == method]
        for method in baselines.METHODS
    }
    density = curves["RRAttention paper"][1][0]
    mass = {method: quality._interpolate(sorted(curve), density) for method, curve in curves.items()}
    kept = {method: value for method, value in mass.items() if value is not None}

    assert len(kept) >= 6 and "oracle" not in [min(kept, key=kept.get)]
    assert min(kept, key=kept.get) == "random"
    assert max(kept, key=kept.get).startswith("oracle") or mass["oracle paper"] is None
    for row in rows:
        assert 0 < row["chosen"] <= row["density"] <= 1 and 0 < row["mass"] <= 1 + 1e-6


def test_the_oracle_under_the_row_rule_really_carries_tau():
    inputs, baselines = generated(300), room("baselines")
    grid = grid_of(inputs, SMALL)
    mass = baselines.block_mass(inputs.q, inputs.k, grid, scale=inputs.scale)
    kept = baselines.METHODS["oracle paper"].choose(inputs.q, inputs.k, grid, SMALL, inputs.scale).mask()

    assert ((mass * kept).sum(-1) >= SMALL.tau * mass.sum(-1) - 1e-4).all()


@pytest.fixture(scope="module")
def text_task(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("benchmarks") / "model")
    text = path.parent / "text.txt"
    text.write_text(" ".join(CORPUS * 8))
    return path, text


def load(path, text, *more, tokens=600, excerpts=1):
    arguments = Namespace(model=str(path), text=[text, *more], excerpts=excerpts, device=torch.device("cpu"))
    return room("models").load_task(arguments, torch.float32, tokens)


def test_captured_inputs_give_the_layers_own_attention_output(text_task):
    task = load(*text_task)
    own = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: own.__setitem__(i, args[0]))
        for i, layer in enumerate(task.model.model.language_model.layers)
    ]
    before = task.loss()
    for hook in hooks:
        hook.remove()
    captured = room("models").capture(task)

    assert [inputs.name.rpartition(" ")[2] for inputs in captured] == ["0", "1"]
    for i, (name, q, k, v, scale) in enumerate((c.name, c.q, c.k, c.v, c.scale) for c in captured):
        assert k.shape[1] == 2 and q.shape[1] == 4, name
        out = dense_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, own[i], rtol=1e-4, atol=1e-5)
    assert task.loss() == before, "afterwards the model attends as it did"


def test_text_loss_is_that_of_the_second_half(text_task):
    task = load(*text_task, tokens=101)
    ids = AutoTokenizer.from_pretrained(text_task[0])(text_task[1].read_text(), return_tensors="pt").input_ids[:, :101]
    with torch.no_grad():
        logs = task.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = -sum(float(logs[i, ids[0, i + 1]]) for i in range(50, 100)) / 50

    assert task.loss() == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_excerpts_is_the_mean_of_theirs_from_the_first_to_the_last(text_task):
    task = load(*text_task, tokens=101, excerpts=3)
    ids = AutoTokenizer.from_pretrained(text_task[0])(text_task[1].read_text(), return_tensors="pt").input_ids[0]
    starts = [0, (len(ids) - 101) // 2, len(ids) - 101]
    with torch.no_grad():
        logs = [task.model(input_ids=ids[None, start : start + 101]).logits[0].log_softmax(-1) for start in starts]
    losses = [
        float(log[i, ids[start + i + 1]]) for log, start in zip(logs, starts, strict=True) for i in range(50, 100)
    ]

    assert task.loss() == pytest.approx(-sum(losses) / 150, rel=1e-4)
    assert "3 excerpts of 101 tokens" in task.name


def test_every_text_gives_as_many_excerpts(text_task, tmp_path):
    path, text = text_task
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(CORPUS * 8)))
    alone = [load(path, each, tokens=101, excerpts=2).loss() for each in (text, other)]
    together = load(path, text, other, tokens=101, excerpts=2)

    assert together.loss() == pytest.approx(sum(alone) / 2, rel=1e-5) and alone[0] != alone[1]
    assert "text.txt, other.txt, 4 excerpts of 101 tokens" in together.name


def test_divergence_is_how_far_predictions_are_from_those_of_dense_attention(text_task):
    quality, task = room("quality"), load(*text_task, excerpts=2)
    way = room("baselines").Way(room("baselines").rrattention, "dropped", 16, 4)
    dense_loss, (half, whole) = quality.losses_with(task, [(way, 0.5), (way, 1.0)])

    def attention(layer, q, k, v, scale):
        length = q.shape[2]
        kept = quality.chosen(way, 0.5, q, k, scale).mask().repeat_interleave(16, 2).repeat_interleave(16, 3)
        hidden = ~kept[:, :, :length, :length] | torch.ones(length, length).triu(1).bool()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return (scale * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    expected = []
    for read in task.readings:
        dense = read()[0].detach().double().softmax(-1)
        with room("models").attending(task.model, attention):
            sparse = read()[0].detach().double().softmax(-1)
        expected += [(p * (p / q).log()).sum() for p, q in zip(dense, sparse, strict=True)]

    assert half.divergence == pytest.approx(float(sum(expected) / len(expected)), rel=1e-3) and half.divergence > 1e-5
    assert half.stats.density() < 1 and whole.stats.density() == 1
    assert whole.divergence == pytest.approx(0, abs=1e-7) and whole.loss == pytest.approx(dense_loss, rel=1e-6)
    assert dense_loss == pytest.approx(task.loss(), rel=1e-5)


def test_quality_of_a_text_ends_in_one_line_of_json_and_a_plot(run_script, text_task, tmp_path):
    path, text = text_task
    plot = tmp_path / "plot.svg"
    options = ("--tokens", 500, "--tau", 0.9, 0.6, "--methods", "RRAttention paper", "random", "--layers", 1)
    code, printed, summary = run_script("quality", "--model", path, "--text", text, *options, "--plot", plot)

    assert code == 0 and summary["green"] and "500 tokens" in summary["inputs"]
    assert [(row["method"], row["tau"]) for row in summary["rows"]] == [
        (method, tau) for method in ("RRAttention paper", "random") for tau in (0.9, 0.6)
    ]
    for row in summary["rows"]:
        assert row["increase"] == pytest.approx(row["loss"] / summary["dense loss"] - 1, abs=1e-4)
    lines = ElementTree.parse(plot).getroot().iter("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [2, 2]
    assert "at the densities of RRAttention paper" in printed


def test_weights_of_heads_are_written_and_measured(run_script, text_task, tmp_path):
    path, text = text_task
    weights = tmp_path / "weights.json"
    text = ("--text", text, "--tokens", 500)
    code, _, found = run_script("calibrate", "--model", path, *text, "--write", weights)
    assert code == 0 and found["least"] < 1 < found["most"]
    assert [len(row) for row in json.loads(weights.read_text())] == [4, 4]

    methods = ("--methods", "RRAttention", "RRAttention weighted", "--tau", 0.6)
    code, _, summary = run_script("quality", "--model", path, *text, *methods, "--head-weights", weights)
    alike, weighted = summary["rows"]
    assert code == 0 and summary["green"]
    assert (weighted["density"], weighted["loss"]) != (alike["density"], alike["loss"])
    weights.write_text(json.dumps([[1, 1, 1, 1]] * 2))
    _, _, summary = run_script("quality", "--model", path, *text, *methods, "--head-weights", weights)
    alike, weighted = summary["rows"]
    assert weighted | {"method": None} == pytest.approx(alike | {"method": None}), "all heads weigh the same"


def test_weighted_ways_need_weights(run_script, capsys):
    with pytest.raises(SystemExit):
        run_script("quality", "--methods", "RRAttention weighted")
    assert "needs --head-weights" in capsys.readouterr().err


def test_quality_on_videos_counts_the_tokens_of_the_answers(run_script):
    options = ("--world-seconds", 60, "--tau", 0.7, "--methods", "RRAttention", "--layers", 2)
    code, _, summary = run_script("quality", "--model", "tiny", *options)

    (row,) = summary["rows"]
    assert code == 0 and summary["green"] and "1 videos of our world" in summary["inputs"]
    assert 0 < row["density"] < 1 and 0 < row["loss density"] < 1
    assert math.isfinite(row["loss"]) and math.isfinite(summary["dense loss"]) and row["loss"] != summary["dense loss"]


@pytest.mark.parametrize(
    ("options", "clips"),
    [
        (["--video-seconds", 8, "--excerpts", 3], [(0, 8), (26, 34), (52, 60)]),
        (["--video-seconds", 8], [(0, 8)]),
        (["--video-seconds", 600, "--excerpts", 3], [(0, None)]),
        ([], [(0, None)]),
    ],
)
def test_excerpts_of_a_video_are_spread_over_it_and_each_is_asked_for_itself(monkeypatch, options, clips):
    models, question, sample = room("models"), "What appears first?", cli.SAMPLE
    monkeypatch.setattr(models, "DESCRIBE", question)
    parser = ArgumentParser()
    models.add_model_arguments(parser)
    given = ["--model", "tiny", "--video", sample, "--device", "cpu", *options]
    task = models.load_task(parser.parse_args([str(each) for each in given]), torch.float32)

    qa = VideoQA.load("tiny", device="cpu")
    videos = [qa.watch(sample, start=start, end=end) for start, end in clips]
    answers = [video.ask(question).text for video in videos]
    assert len(set(answers)) == len(answers) == len(task.readings)
    for read, answer in zip(task.readings, answers, strict=True):
        logits, right = read()
        assert qa.checkpoint.tokenizer.decode(right, skip_special_tokens=True) == answer
        assert torch.equal(logits.argmax(dim=-1), right)


def test_a_calibration_without_room_says_what_to_do(monkeypatch):
    def none_left(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.")

    monkeypatch.setattr("rrattention.calibration.calibrate", none_left)
    options = ["--model", "tiny", "--video", str(cli.SAMPLE), "--write", "weights.json"]
    monkeypatch.setattr("sys.argv", ["calibrate.py", *options])
    with pytest.raises(
        SystemExit, match=r"read shorter excerpts \(--tokens, --video-seconds\)\. Tried to allocate 9 GiB"
    ):
        room("calibrate").main()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--video", "none.mp4"], r"^calibrate\.py: there is no file none\.mp4$"),
        (["--text", "none.txt"], r"^calibrate\.py: .*No such file.*none\.txt"),
        (["--text", cli.SAMPLE], r"^calibrate\.py: .*codec can't decode"),
        (["--world-seconds", 9], r"long enough to leave out blocks of 128 .*--world-seconds say how long each is"),
        (["--tau", 2], "^2$"),
        (["--write", "/none/weights.json"], "^2$"),
    ],
)
def test_what_calibrate_cannot_use_is_told_in_a_line(run_script, options, told):
    with pytest.raises(SystemExit, match=told):
        run_script("calibrate", "--model", "tiny", "--write", "weights.json", *options)


def test_losses_are_compared_at_the_densities_of_the_runs_that_they_come_from():
    points = [
        ("RRAttention paper", 0.5, 0.6, 0.04, 1e-2),
        ("RRAttention paper", 0.3, 0.2, 0.09, 1e-1),
        ("other", 0.4, 0.5, 0.05, 1e-1),
        ("other", 0.45, 0.7, 0.01, 1e-3),
    ]
    keys = ("method", "density", "loss density", "increase", "divergence")
    rows = [dict(zip(keys, point, strict=True)) | {"error": 0.2} for point in points]
    paper, other, *rest = room("quality").at_equal_density(rows)

    assert (paper["method"], paper["error"], paper["increase"]) == ("RRAttention paper", 0.2, 0.04)
    assert other["error"] is None, "no two points of its stand around a density of .5"
    assert other["increase"] == pytest.approx(0.03) and other["divergence"] == pytest.approx(1e-2)
    assert [row["method"] for row in rest] == ["RRAttention paper"]
