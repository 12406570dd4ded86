"""`rrvideo doctor`: what it finds, working or broken, and what it advises."""

import json
import sys
from importlib import metadata

import pytest

from rrvideo import doctor

pytest_plugins = ["commands"]
pytestmark = pytest.mark.usefixtures("no_settings")


def test_doctor_says_what_works_and_what_to_do_about_the_rest(rrvideo, monkeypatch):
    monkeypatch.setenv("RRVIDEO_MODEL", "my/model")
    code, out, _ = rrvideo("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}

    assert code == 0
    assert checks["torch"]["found"] == metadata.version("torch")
    assert checks["embedded model"]["status"] == "ok"
    assert checks["default model"]["found"] == "my/model"
    assert all(check["advice"] for check in checks.values() if check["status"] == "missing")
    lines = rrvideo("doctor")[1].splitlines()
    assert sum(line.startswith(("ok ", "note ", "missing ")) for line in lines) == len(checks)


def test_doctor_survives_what_it_finds_broken(rrvideo, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "EMBEDDED", tmp_path / "model.safetensors")
    code, out, _ = rrvideo("doctor", "--json")
    status = {check["name"]: check["status"] for check in json.loads(out)["checks"]}

    assert code == 1
    assert [name for name in status if status[name] == "missing"] == ["torch", "av", "embedded model"]
    assert {status[name] for name in ("decord", "gpu", "real models")} == {"note"}


def test_doctor_finds_downloaded_models(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name, kind in (("Qwen--Qwen2-VL-2B-Instruct", "qwen2_vl"), ("meta--Llama", "llama")):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = next(check for check in doctor.examine() if check.name == "downloaded")

    assert (found.status, found.found) == ("ok", f"Qwen/Qwen2-VL-2B-Instruct in {tmp_path}")


@pytest.mark.parametrize(
    ("name", "memory", "status", "advice"),
    [
        ("NVIDIA H100", 85.0, "ok", "--model Qwen/Qwen2-VL-7B-Instruct"),
        ("NVIDIA RTX 4090", 25.3, "ok", "--model Qwen/Qwen2-VL-7B-Instruct"),
        ("NVIDIA RTX 4060", 8.2, "ok", "--model Qwen/Qwen2-VL-2B-Instruct"),
        ("", 16.8, "note", "--model Qwen/Qwen2-VL-2B-Instruct"),
        ("", 4.1, "note", "the smallest is Qwen/Qwen2-VL-2B-Instruct"),
    ],
    ids=["h100", "4090", "4060", "laptop", "small"],
)
def test_doctor_knows_which_models_fit(monkeypatch, name, memory, status, advice):
    monkeypatch.setattr(doctor, "_accelerator", lambda: (name, memory))

    found = doctor._real_models()
    assert (found[0], found[2]) == (status, advice)
