"""The benchmarks of the kernels, end to end at small sizes: what they print means what it says."""

import importlib
import itertools
import json
import math
import runpy
import sys
from argparse import Namespace
from dataclasses import astuple
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from checkpoints import CORPUS, make_checkpoint
from transformers import AutoTokenizer

from rrattention import BlockGrid, RRConfig, dense_attention, estimate, select

FOLDER = Path(__file__).parent.parent / "kernels" / "benchmarks"
SMALL = RRConfig(block_size=16, stride=4, min_tokens=0)


@pytest.fixture(scope="module", autouse=True)
def folder():
    """The scripts import one another as files of one folder do: they are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def room(name):
    return importlib.import_module(name)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = room(script).main()
        printed = capsys.readouterr().out
        return code, printed, json.loads(printed.splitlines()[-1])

    return run


def generated(length, seed=0, heads=4, kv_heads=2, head_dim=32):
    return room("inputs").generate(heads, kv_heads, head_dim, length, seed=seed)


def grid_of(inputs, config):
    length = inputs.q.shape[2]
    return BlockGrid.of(inputs.q, length, length, config)


SHAPE = ("--heads", 4, "--kv-heads", 2, "--head-dim", 32)
PREFILL = (*SHAPE, "--lengths", 512, 300, "--tau", 0.9, 0.7, "--seconds", 0.001)
WAYS = {"RRAttention": RRConfig, "RRAttention paper": RRConfig.paper, "RRAttention fine": RRConfig.fine}


def test_prefill_says_how_fast_each_way_is_and_what_it_keeps(run, tmp_path):
    rules = ("--rule", "default", "paper", "fine")
    code, printed, summary = run("prefill", *PREFILL, *rules, "--json", tmp_path / "out.json")

    assert code == 0 and summary["green"] and "gate green" in printed
    assert json.loads((tmp_path / "out.json").read_text()) == summary
    assert [row["length"] for row in summary["rows"]] == [300] * 7 + [512] * 7
    dense = next(row for row in summary["rows"] if row["way"] == "SDPA" and row["length"] == 512)
    sparse = [row for row in summary["rows"] if "tau" in row and row["length"] == 512]
    assert [(row["way"], row["tau"]) for row in sparse] == [(way, tau) for tau in (0.9, 0.7) for way in WAYS]
    inputs = generated(512)
    for row in sparse:
        config = WAYS[row["way"]](tau=row["tau"])
        kept = select(estimate(inputs.q, inputs.k, config=config), 512, 512, config=config)
        assert row["density"] == pytest.approx(kept.density().item(), abs=1e-5)
        assert row["speedup"] == pytest.approx(dense["ms"] / row["ms"], rel=1e-4)
        assert row["low"] <= row["ms"] <= row["high"] and row["runs"] >= 3
        assert row["overhead"] == pytest.approx((row["estimate"] + row["select"]) / dense["ms"], rel=1e-4)
        assert row["TFLOP/s"] == pytest.approx(4e-9 * 32 * row["pairs"] / row["attend"], rel=1e-4)
        assert 0 < row["error"] < 1


def test_prefill_reports_no_speed_on_a_red_gate(run, monkeypatch):
    attend = room("prefill").attend

    def slightly_wrong(*args, backend, **options):
        return attend(*args, backend=backend, **options) * (1.0 if backend == "reference" else 1.001)

    monkeypatch.setattr(room("prefill"), "attend", slightly_wrong)
    code, printed, summary = run("prefill", *PREFILL)

    assert code == 1 and not summary["green"] and summary["rows"] == []
    assert "gate RED: attend" in printed and "speedup" not in printed


def test_prefill_looks_at_rows_of_every_timed_output(run, monkeypatch):
    prefill = room("prefill")
    attend = prefill.attend

    def wrong_far_away(q, *args, **options):
        out = attend(q, *args, **options)
        if q.shape[2] == 512:
            out[:, :, 500:] += 1.0
        return out

    monkeypatch.setattr(prefill, "attend", wrong_far_away)
    code, printed, summary = run("prefill", *PREFILL)

    assert code == 1 and "gate RED: rows at 512" in printed
    assert {row["length"] for row in summary["rows"]} == {300}


def test_kept_pairs_are_those_that_causal_attention_over_the_blocks_computes():
    inputs = generated(300)
    selection = select(estimate(inputs.q, inputs.k, config=SMALL), 300, 300, config=SMALL)
    tokens = selection.mask().repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)[..., :300, :300]

    assert room("prefill").kept_pairs(selection) == tokens.tril().sum()


def test_ceilings_are_rates_of_the_device():
    found = room("prefill").ceilings(torch.device("cpu"))

    assert found.keys() == {"copy GB/s", "float32 matmul TFLOP/s"}
    assert all(0 < rate < 1e5 for rate in found.values())


def test_generated_density_is_a_property_of_the_generator_and_not_of_its_seed():
    densities = []
    for seed in range(4):
        inputs = generated(4096, seed, heads=8, kv_heads=2, head_dim=64)
        selection = select(estimate(inputs.q, inputs.k), 4096, 4096, config=RRConfig(tau=0.95))
        densities.append(selection.density().item())
    noise = select(estimate(torch.randn_like(inputs.q), torch.randn_like(inputs.k)), 4096, 4096, config=RRConfig())

    assert max(densities) - min(densities) < 0.05
    assert min(densities) > 0.4 and max(densities) < 0.65  # about 0.3 at 32K tokens
    assert noise.density() > 0.9


def test_generated_queries_look_at_sinks_neighbours_and_their_needles():
    inputs = generated(2048, heads=8, kv_heads=2, head_dim=64)
    layout = room("inputs")._Layout.draw(2048, torch.Generator().manual_seed(0), torch.device("cpu"))
    logits = inputs.scale * inputs.q[0] @ inputs.k[0].repeat_interleave(4, dim=0).mT
    mass = logits.masked_fill(torch.ones(2048, 2048, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    late = torch.arange(1024, 2048)
    distance = late[:, None] - torch.arange(2048)
    sink = mass[:, late, :4].sum(-1).mean(-1)
    near = (mass[:, late] * ((distance >= 0) & (distance < 64))).sum(-1).mean(-1)
    wanting = layout.needle_of_query >= 0
    needle = (mass * (layout.needle_of_query[:, None] == layout.needle_of_key))[:, wanting].sum(-1).mean(-1)

    assert 0.3 < sink.mean() < 0.7 and sink.min() < 0.2, "most heads rest on the sink, some do not"
    assert near.max() > 0.25 and near.min() < 0.05, "some heads look at their neighbours, some elsewhere"
    assert needle.mean() > 0.4, "one needle of 16 keys among 2048"


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
        dense = read()[0].double().softmax(-1)
        with room("models").attending(task.model, attention):
            sparse = read()[0].double().softmax(-1)
        expected += [(p * (p / q).log()).sum() for p, q in zip(dense, sparse, strict=True)]

    assert half.divergence == pytest.approx(float(sum(expected) / len(expected)), rel=1e-3) and half.divergence > 1e-5
    assert half.stats.density() < 1 and whole.stats.density() == 1
    assert whole.divergence == pytest.approx(0, abs=1e-7) and whole.loss == pytest.approx(dense_loss, rel=1e-6)
    assert dense_loss == pytest.approx(task.loss(), rel=1e-5)


def test_quality_of_a_text_ends_in_one_line_of_json_and_a_plot(run, text_task, tmp_path):
    path, text = text_task
    plot = tmp_path / "plot.svg"
    options = ("--tokens", 500, "--tau", 0.9, 0.6, "--methods", "RRAttention paper", "random", "--layers", 1)
    code, printed, summary = run("quality", "--model", path, "--text", text, *options, "--plot", plot)

    assert code == 0 and summary["green"] and "500 tokens" in summary["inputs"]
    assert [(row["method"], row["tau"]) for row in summary["rows"]] == [
        (method, tau) for method in ("RRAttention paper", "random") for tau in (0.9, 0.6)
    ]
    for row in summary["rows"]:
        assert row["increase"] == pytest.approx(row["loss"] / summary["dense loss"] - 1, abs=1e-4)
    lines = ElementTree.parse(plot).getroot().iter("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [2, 2]
    assert "at the densities of RRAttention paper" in printed


def test_quality_on_videos_counts_the_tokens_of_the_answers(run):
    options = ("--world-seconds", 60, "--tau", 0.7, "--methods", "RRAttention", "--layers", 2)
    code, _, summary = run("quality", "--model", "tiny", *options)

    (row,) = summary["rows"]
    assert code == 0 and summary["green"] and "1 videos of our world" in summary["inputs"]
    assert 0 < row["density"] < 1 and 0 < row["loss density"] < 1
    assert math.isfinite(row["loss"]) and math.isfinite(summary["dense loss"]) and row["loss"] != summary["dense loss"]


def test_work_is_timed_by_turns_after_two_runs_that_do_not_count():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = room("harness").measure(works, torch.device("cpu"), 0.0)

    assert "".join(calls) == "aabb" + "ab" * 3
    assert times["a"].runs == 3 and times["a"].low <= times["a"].median <= times["a"].high


def test_what_is_not_a_number_becomes_null_in_the_last_line(capsys):
    room("harness").finish({"a": float("nan"), "b": [1.23456789, None]}, None)

    assert capsys.readouterr().out == '{"a": null, "b": [1.23457, null]}\n'


def test_a_chart_puts_larger_values_higher_and_names_its_lines():
    chart = ElementTree.fromstring(room("chart").line_chart("t", "x", "y", {"a & b": [(0.5, 0.1), (0.25, 0.4)]}))
    svg = "{http://www.w3.org/2000/svg}"
    (line,) = chart.iter(f"{svg}polyline")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())

    assert x0 < x1 and y0 < y1, "y grows downwards: the left point is the higher one"
    assert "a & b" in [text.text for text in chart.iter(f"{svg}text")]
    with pytest.raises(ValueError, match="must have a point"):
        room("chart").line_chart("t", "x", "y", {"empty": []})


def test_autotune_writes_one_line_of_the_launch_table(tmp_path):
    autotune, launch = room("autotune"), importlib.import_module("rrattention.triton.launch")
    copy = tmp_path / "launch.py"
    copy.write_text(Path(launch.__file__).read_text())
    key = ("attend", 128, 16)
    autotune.write(copy, 90, key, launch.Launch(16, 32, 4, 2))

    before, after = launch.TABLE, runpy.run_path(str(copy))["TABLE"]
    changed = [(a, each) for a in after for each in after[a] if astuple(after[a][each]) != astuple(before[a][each])]
    assert changed == [(90, key)] and astuple(after[90][key]) == (16, 32, 4, 2)
    with pytest.raises(ValueError, match="no line for"):
        autotune.write(copy, 90, ("attend", 72, 16), launch.Launch(16, 32, 4, 2))


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
