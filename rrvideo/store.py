"""A watched video on disk: `save` writes what the model has seen of it, `read` brings it back without watching again.

The file is a safetensors file: keys and values of every layer, the prompt's tokens and positions and the index of the
video's frames, with one JSON record in its metadata. Nothing in it can be executed. It is bound to the checkpoint, the
type of the weights and the attention that it was made with, because with others the same video has other answers. It is
not bound to a device. The video file may be gone, but no other one may be in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from fractions import Fraction
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from rrvideo.engine import Watched, new_cache
from rrvideo.errors import ModelError, RRVideoError, VideoError
from rrvideo.frameindex import FrameIndex, Upright
from rrvideo.model import Checkpoint
from rrvideo.tokens import Prefix
from rrvideo.video import SamplePlan, VideoInfo

__all__ = ["FileMark", "Saved", "checkpoint_digest", "describe", "read", "save"]

FORMAT = 3
MIB = 2**20
# The files, beside the weights, that a model is made from, and what turns text into tokens and pictures into pixels.
DESCRIBING = {
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
}
SAMPLE = 1024  # bytes of each weight tensor, which tell one checkpoint from another


@dataclass(frozen=True, slots=True)
class FileMark:
    """What tells whether a file is still the same: its size in bytes, and a digest of its first and last MiB."""

    path: str
    size: int
    digest: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileMark:
        """Mark the file at `path` as it is now."""
        file = Path(path).absolute()
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            digest = sha256(opened.read(MIB))
            opened.seek(max(0, size - MIB))
            digest.update(opened.read(MIB))
        return cls(str(file), size, digest.hexdigest())

    @property
    def has_changed(self) -> bool:
        """Whether another file is in its place now. One that is gone, or may not be read, has not changed."""
        try:
            return Path(self.path).is_file() and FileMark.of(self.path) != self
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Saved:
    """What is kept of a video."""

    plan: SamplePlan
    warnings: tuple[str, ...]
    file: FileMark
    watched: Watched


def save(path: str | os.PathLike[str], video: Saved) -> None:
    """Write a watched video to the file `path`, replacing one that is there once all of it is written.

    It takes the bytes of the KV cache on disk, and meanwhile in the host's memory. Raises `RRVideoError` if the file
    cannot be written, or is there and no saved video, and `RuntimeError` if the video is closed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    watched, target = video.watched, Path(path)
    if watched.cache is None:
        raise RuntimeError("the video is closed")
    if target.is_file() and target.stat().st_size and not _is_saved(target):
        raise RRVideoError(f"{target} is there, and it is no saved video", "name another file, or delete this one")
    tensors: dict[str, torch.Tensor] = {}
    record = {
        "format": FORMAT,
        "rrvideo": version("rrvideo"),
        "model": describe(watched.checkpoint),
        "file": asdict(video.file),
        "plan": _taken_apart(video.plan, "plan", tensors),
        "prefix": _taken_apart(watched.prefix, "prefix", tensors),
        "warnings": video.warnings,
        "frames": watched.frames,
        "density": watched.density,
        "seconds": watched.seconds,
    }
    for number, layer in enumerate(watched.cache.layers):
        for name, whole in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"{name}.{number}"] = whole[:, :, : len(watched.prefix)].cpu().contiguous()
    text = json.dumps(record)
    try:
        # In a folder of its own, beside the target: what fails half-way is swept away and never opened.
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            partial = Path(folder) / target.name
            save_file(tensors, partial, metadata={"rrvideo": text, "sha256": _digest(text, tensors)})
            partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise RRVideoError(f"{target} cannot be written: {error}") from error


def _is_saved(file: Path) -> bool:
    """Whether a file is one that `save` has written, damaged or not."""
    try:
        with file.open("rb") as opened:
            length = min(int.from_bytes(opened.read(8), "little"), file.stat().st_size)
            header = json.loads(opened.read(length))
        return "rrvideo" in header["__metadata__"]
    except (OSError, LookupError, TypeError, ValueError):
        return False


def read(path: str | os.PathLike[str], checkpoint: Checkpoint, *, cache: Literal["device", "offload"]) -> Saved:
    """Bring back what `save` wrote to the file `path`, for the model that saw it.

    Raises `VideoError` if the file is not whole or the video has changed since, and `ModelError` if it was made with
    another checkpoint, type of weights or attention.
    """
    from safetensors import safe_open

    file = Path(path)
    if not file.is_file():
        raise VideoError(f"there is no file {file}")
    with _damage_told(file), safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        record = json.loads(metadata["rrvideo"])
        if record["format"] != FORMAT:
            raise VideoError(
                f"{file.name} was saved by rrvideo {record['rrvideo']}, in another format",
                "open it with that version, or watch the video again",
            )
        _check_model(record["model"], checkpoint, file.name)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        if metadata["sha256"] != _digest(metadata["rrvideo"], tensors):
            raise ValueError("its contents are not those that were written")
        mark, plan = FileMark(**record["file"]), _plan(record["plan"], tensors)
        prefix = Prefix(**_put_together(record["prefix"], "prefix", tensors))
        costs = {name: record[name] for name in ("frames", "density", "seconds")}
        warnings = tuple(record["warnings"])
        layers = range(sum(name.startswith("keys.") for name in tensors))
        states = [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in layers]
    if mark.has_changed:
        raise VideoError(
            f"{Path(mark.path).name} has changed since it was watched, and {file.name} is of what it was then",
            f"watch it again; or put the one that was watched, or none, at {mark.path}",
        )
    kept = new_cache(checkpoint, len(prefix), cache)
    for layer, (keys, values) in enumerate(states):
        kept.update(keys, values, layer)
    return Saved(plan, warnings, mark, Watched(checkpoint=checkpoint, prefix=prefix, cache=kept, **costs))


def checkpoint_digest(folder: Path) -> str:
    """Tell a checkpoint by its configuration and tokenizer, and by the beginning of each of its tensors.

    It reads the files that a model is loaded from, whichever folder they are in, but of each tensor only the first
    KiB: training, merging an adapter and converting change whole matrices, and so their beginnings too.
    """
    digest = sha256()
    for file in sorted(folder.iterdir()):
        if file.name in DESCRIBING:
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            with file.open("rb") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
                digest.update(file.name.encode() + header)
                layout = json.loads(header)
                layout.pop("__metadata__", None)
                for tensor in layout.values():
                    start, stop = tensor["data_offsets"]
                    opened.seek(8 + len(header) + start)
                    digest.update(opened.read(min(SAMPLE, stop - start)))
    return digest.hexdigest()


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What answers of a model depend on, beside what it has seen: its name, weights, their type, and attention."""
    return {
        "name": checkpoint.name,
        "family": checkpoint.family.model_type,
        "digest": checkpoint_digest(checkpoint.folder),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "attention": checkpoint.model.config.get_text_config().rrattention,
    }


def _check_model(made_with: Mapping[str, Any], checkpoint: Checkpoint, name: str) -> None:
    found = describe(checkpoint)
    if found["digest"] != made_with["digest"]:
        raise ModelError(
            f"{name} was watched by {made_with['name']} ({made_with['family']}), and the files of {checkpoint.name} "
            "hold another model",
            "load the model that watched it, or watch the video again",
        )
    if found["dtype"] != made_with["dtype"]:
        raise ModelError(
            f"{name} was watched in {made_with['dtype']}, and {checkpoint.name} is loaded in {found['dtype']}",
            f"load it with dtype={made_with['dtype']!r}, or watch the video again",
        )
    if found["attention"] != made_with["attention"]:
        config = dict(made_with["attention"]["config"])
        weights = ", and the head_weights that it was watched with" if config.pop("head_weights", None) else ""
        raise ModelError(
            f"{name} was watched with other attention than {checkpoint.name} is loaded with",
            f"load it with attention={made_with['attention']['attention']!r} and config=RRConfig(**{config}){weights}",
        )


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise VideoError(
            f"{file.name} is no saved video, or it is damaged", "watch the video again, and save it anew"
        ) from error


def _digest(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = sha256(record.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _taken_apart(part: Any, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a dataclass as JSON takes them, except for tensors and arrays, which go into `tensors`."""
    plain: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor | np.ndarray):
            # A copy: two fields may be one array, which safetensors refuses.
            tensors[f"{name}.{field.name}"] = torch.tensor(value) if isinstance(value, np.ndarray) else value.clone()
        elif is_dataclass(value):
            plain[field.name] = _taken_apart(value, f"{name}.{field.name}", tensors)
        else:
            plain[field.name] = str(value) if isinstance(value, Fraction) else value
    return plain


def _put_together(plain: Mapping[str, Any], name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields that `_taken_apart` found, but for what lies deeper."""
    found = {field: tuple(value) if isinstance(value, list) else value for field, value in plain.items()}
    for key, tensor in tensors.items():
        parent, _, field = key.rpartition(".")
        if parent == name:
            found[field] = tensor.clone()  # what is read belongs to the file, which may be replaced
    return found


def _plan(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> SamplePlan:
    index = _put_together(record["index"], "plan.index", tensors)
    index = {field: value.numpy() if isinstance(value, torch.Tensor) else value for field, value in index.items()}
    index |= {"upright": Upright(**index["upright"]), "time_base": Fraction(index["time_base"])}
    info = VideoInfo(**_put_together(record["info"], "plan.info", tensors))
    return SamplePlan(**_put_together(record, "plan", tensors) | {"info": info, "index": FrameIndex(**index)})
