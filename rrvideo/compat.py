"""Mends one combination of packages that cannot be imported together as installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def mend_torchvision() -> Any:
    """Make `import torchvision` work beside a CPU build of torch; call it before transformers is imported.

    The torchvision wheel on PyPI for Linux is a CUDA build. Next to a CPU build of torch its compiled operators do not
    load, and its import then fails with "operator torchvision::nms does not exist", which takes transformers and
    qwen-vl-utils down with it. Nothing here calls those operators, so declaring their schemas is enough.

    Returns the library that holds the declarations (it has to outlive them, hence the cache), or None where torchvision
    is absent or imports as it is. Any other failure to import torchvision is raised.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None

    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
