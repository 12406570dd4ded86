"""Load a checkpoint: a model, its tokenizer, and what its processor's configuration says about frames.

Checkpoints have the Hugging Face layout and are named by folder or hub id. `families.FAMILIES` lists which models are
supported, and what differs between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from rrvideo.compat import mend_torchvision
from rrvideo.errors import ModelError
from rrvideo.families import FAMILIES, Family
from rrvideo.tokens import VIDEO_PAD, PatchSpec, Prefix, build_prefix, build_question
from rrvideo.video import PixelLimits
from rrvideo.vision import use_segment_attention

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from rrattention import RRConfig

__all__ = ["FAMILIES", "Checkpoint", "Family", "load"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with all that is needed to turn frames and text into its inputs."""

    name: str
    family: Family
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: PatchSpec
    limits: PixelLimits
    folder: Path  # where its files are, also those of a hub id
    device: torch.device  # where token ids and embeddings go; with a device map the model may be on others too

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context_length(self) -> int:
        """Positions that the model was made for, prompt and answer together; the tokens of a frame share some."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def feature_width(self) -> int:
        """Numbers that `encode` gives for a visual token: its embedding, and what is added to it in the first layers.

        The latter are Qwen3-VL's deepstack features (Qwen3-VL, section 2.2); the other families have none.
        """
        config = self.model.config
        levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        return int(config.get_text_config().hidden_size) * (1 + levels)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(id for id in (*ids, self.tokenizer.eos_token_id) if id is not None)

    def prefix(self, times: Sequence[float], size: tuple[int, int], *, timestamps: bool | None = None) -> Prefix:
        """`tokens.build_prefix` for this checkpoint; `timestamps` defaults to what the family needs to tell time."""
        family = self.family
        return build_prefix(
            self.tokenizer,
            self.spec,
            times,
            size,
            timestamps=not family.tells_time if timestamps is None else timestamps,
            label=family.label,
            part_steps=family.parts_steps,
            tokens_per_second=self.model.config.vision_config.tokens_per_second if family.tells_time else None,
        )

    def question(self, prefix: Prefix, turns: Sequence[str]) -> torch.Tensor:
        """`tokens.build_question` for this checkpoint."""
        return build_question(self.tokenizer, prefix, turns)

    @torch.no_grad()
    def encode(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Vision features `[visual tokens, feature_width]` of patches; any number of whole steps at a time.

        `patches` are those of `patchify`, and `grid_thw` `[segments, 3]` describes them. A step's features do not
        depend on the others.
        """
        tower = self.model.model.visual
        output = tower(patches.to(tower.device, tower.dtype), grid_thw=grid_thw.to(tower.device), return_dict=True)
        deepstack = getattr(output, "deepstack_features", [])
        return torch.cat([output.pooler_output, *deepstack], dim=-1).to(self.device)

    @torch.no_grad()
    def embed(
        self, input_ids: torch.Tensor, visual: torch.Tensor | None = None, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `forward` takes for the tokens `input_ids`: `[..., hidden]` of text.

        With the features of those tokens that are `visual` (`[tokens]` bool), it is `[tokens, feature_width]`.
        """
        embeddings = self.model.get_input_embeddings()(input_ids.to(self.device))
        if visual is not None and features is not None:
            embeddings = F.pad(embeddings, (0, features.shape[-1] - embeddings.shape[-1]))  # nothing is added to text
            embeddings[visual] = features
        return embeddings

    def attending(self, attention: Literal["rr", "full"], config: RRConfig | None = None) -> Checkpoint:
        """Return this checkpoint with other settings of attention: another model around the same weights."""
        from rrattention.transformers import enable

        weights = chain(self.model.parameters(), self.model.buffers())
        model = deepcopy(self.model, {id(tensor): tensor for tensor in weights})
        enable(model, config, attention=attention)
        return replace(self, model=model)

    def new_cache(self) -> Cache:
        """An empty KV cache for `forward`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    @torch.no_grad()
    def forward(
        self, embeddings: torch.Tensor, positions: torch.Tensor, cache: Cache | None, *, last_only: bool = True
    ) -> torch.Tensor:
        """Run the language model on what `embed` gives, in a batch, at M-RoPE positions `[3, batch, tokens]`.

        Keys and values are appended to `cache`. Returns logits, `[batch, 1, vocabulary]` of the last token only unless
        `last_only` is false: those of a long prefill would not fit into memory.
        """
        inputs, *deepstack = embeddings.split(self.model.config.get_text_config().hidden_size, dim=-1)
        layered: dict[str, Any] = {}
        if deepstack:  # every token has its row of it, if only of zeros
            layered["visual_pos_masks"] = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
            layered["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in deepstack]
        hidden = self.model.model.language_model(
            inputs_embeds=inputs,
            position_ids=positions.to(inputs.device),
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **layered,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1:] if last_only else hidden)


def load(
    name_or_path: str | Path,
    *,
    attention: Literal["rr", "full"] = "rr",
    config: RRConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Load a checkpoint from a folder, or from the model hub (its local cache, when the hub cannot be reached).

    `device="auto"` takes a GPU where there is one, `dtype="auto"` the checkpoint's own type, or float32 on a CPU,
    where the others are slow. `device_map` spreads the model over devices as accelerate does, instead of `device`.
    Without `weights`, which then need not be there, the checkpoint says all of itself but cannot run.
    Raises `ModelError` if the checkpoint is not there, not supported, or not whole.
    """
    mend_torchvision()
    from rrattention.transformers import enable

    name = str(name_or_path)
    folder = _find(name, weights)
    family = _family(folder, name)
    spec, limits = _frame_format(folder, name, family)
    tokenizer = _load_tokenizer(folder, name)
    target = _device(device) if device_map is None else _device("auto")
    kind = _dtype(dtype, target)
    if weights:
        model = _load_model(folder, name, family, kind, str(target) if device_map is None else device_map)
        target = model.get_input_embeddings().weight.device
    else:
        model = _outline(folder, name, family, kind)
    if tokenizer.convert_tokens_to_ids(VIDEO_PAD) != model.config.video_token_id:
        raise ModelError(f"the tokenizer of {name} does not belong to its model: they differ in the id of {VIDEO_PAD}")
    use_segment_attention(model)
    try:
        enable(model, config, attention=attention)
    except ValueError as error:
        raise ModelError(f"{name} cannot attend so: {error}") from error
    return Checkpoint(name, family, model, tokenizer, spec, limits, folder, target)


def _find(name: str, weights: bool) -> Path:
    """The folder of a checkpoint; one named by hub id is downloaded, or found in the local cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ModelError(
            f"there is no model folder {name}", "pass a folder, or a hub id like Qwen/Qwen2-VL-7B-Instruct"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", *["*.safetensors"] * weights]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of the network, of rights, of the cache: what it raises differs between versions
        raise ModelError(
            f"{name} is no folder here, and the model hub did not give it ({_one_line(error)})",
            "check the name and the network, set HF_TOKEN for a restricted model, or pass a local folder",
        ) from error


def _family(folder: Path, name: str) -> Family:
    from transformers import AutoConfig

    config = _read_json(folder / "config.json", name)
    if config is None:
        raise ModelError(f"{name} is not a checkpoint: it has no config.json", "pass a folder in Hugging Face format")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"{name} is a model of type {model_type}", f"supported are {', '.join(sorted(FAMILIES))}")
    with _failures_as_model_error(name, "configuration"):
        AutoConfig.from_pretrained(folder)
    return FAMILIES[model_type]


def _frame_format(folder: Path, name: str, family: Family) -> tuple[PatchSpec, PixelLimits]:
    processor = _processor_config(folder, name)
    with _failures_as_model_error(name, "processor configuration"):
        spec = family.spec.updated(processor)
        return spec, family.pixel_limits(processor, spec)


def _processor_config(folder: Path, name: str) -> dict[str, Any]:
    """The video processor's configuration, from the places where transformers looks for it, in its order."""
    combined = _read_json(folder / "processor_config.json", name) or {}
    if "video_processor" in combined:
        return dict(combined["video_processor"])
    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (config := _read_json(folder / file, name)) is not None:
            return config
    raise ModelError(f"{name} does not say how its frames are made", "its folder lacks preprocessor_config.json")


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{name} has no tokenizer", "its folder lacks tokenizer.json")
    with _failures_as_model_error(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:  # older checkpoints keep it beside the tokenizer
        tokenizer.chat_template = (_read_json(folder / "chat_template.json", name) or {}).get("chat_template")
    if tokenizer.chat_template is None:
        raise ModelError(f"{name} has no chat template", "use an instruction-tuned checkpoint (-Instruct)")
    return tokenizer


def _load_model(
    folder: Path, name: str, family: Family, dtype: torch.dtype | str, device_map: str | Mapping[str, Any]
) -> PreTrainedModel:
    import transformers

    model_class = getattr(transformers, family.class_name)
    with _failures_as_model_error(name, "weights"):
        model, found = model_class.from_pretrained(
            folder, dtype=dtype, device_map=device_map, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # transformers draws at random what it does not find: such a model would answer, and answer nonsense.
    for what, keys in (
        ("lacks weights", sorted(found["missing_keys"])),
        ("has weights of another shape than its config says", sorted(key[0] for key in found["mismatched_keys"])),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"{name} {what}: {keys[0]}{more}", "download the checkpoint again")
    return model.eval()


def _outline(folder: Path, name: str, family: Family, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model with all its parts and their shapes, but no weights: it takes no memory."""
    import transformers

    with _failures_as_model_error(name, "configuration"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model: PreTrainedModel = getattr(transformers, family.class_name)(config)
        return model.to(dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32).eval()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ModelError(f"device {device} cannot be used: {_one_line(error)}", 'use device="cpu"') from error
    return torch.device(device)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ModelError(f"{dtype} is no type for weights", "use float32, bfloat16 or float16")
    return resolved


def _read_json(path: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoding of text, or of JSON
        raise ModelError(f"{path.name} of {name} is damaged: {error}", "download the checkpoint again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} of {name} does not hold a JSON object", "download the checkpoint again")
    return content


@contextmanager
def _failures_as_model_error(name: str, what: str) -> Iterator[None]:
    """Tell any failure of the libraries as one of the checkpoint, and keep their reports of it off the screen."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # whatever they raise here is about the files, and they raise nearly everything
        raise ModelError(f"the {what} of {name} cannot be loaded: {_one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _one_line(error: BaseException) -> str:
    return shorten(str(error), 200) or type(error).__name__
