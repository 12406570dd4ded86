"""The benchmarks of the kernels, end to end at small sizes: what they print means what it says."""

import importlib
import json
import runpy
from dataclasses import astuple
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from benching import SMALL, generated, room

from rrattention import RRConfig, estimate, select

SHAPE = ("--heads", 4, "--kv-heads", 2, "--head-dim", 32)
PREFILL = (*SHAPE, "--lengths", 512, 300, "--tau", 0.9, 0.7, "--seconds", 0.001)
WAYS = {"RRAttention": RRConfig, "RRAttention paper": RRConfig.paper, "RRAttention fine": RRConfig.fine}


def test_prefill_says_how_fast_each_way_is_and_what_it_keeps(run_script, tmp_path):
    rules = ("--rule", "default", "paper", "fine")
    code, printed, summary = run_script("prefill", *PREFILL, *rules, "--json", tmp_path / "out.json")

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


def test_prefill_reports_no_speed_on_a_red_gate(run_script, monkeypatch):
    attend = room("prefill").attend

    def slightly_wrong(*args, backend, **options):
        return attend(*args, backend=backend, **options) * (1.0 if backend == "reference" else 1.001)

    monkeypatch.setattr(room("prefill"), "attend", slightly_wrong)
    code, printed, summary = run_script("prefill", *PREFILL)

    assert code == 1 and not summary["green"] and summary["rows"] == []
    assert "gate RED: attend" in printed and "speedup" not in printed


def test_prefill_looks_at_rows_of_every_timed_output(run_script, monkeypatch):
    prefill = room("prefill")
    attend = prefill.attend

    def wrong_far_away(q, *args, **options):
        out = attend(q, *args, **options)
        if q.shape[2] == 512:
            out[:, :, 500:] += 1.0
        return out

    monkeypatch.setattr(prefill, "attend", wrong_far_away)
    code, printed, summary = run_script("prefill", *PREFILL)

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
    pytest.importorskip("triton")
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
