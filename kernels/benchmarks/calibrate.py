"""Find out what each head of a model weighs, once for a checkpoint: `RRConfig.head_weights`, written as JSON.

    python kernels/benchmarks/calibrate.py --model PATH --text FILE FILE --tokens 2048 --excerpts 4 --write weights.json
    python kernels/benchmarks/calibrate.py --model PATH --video FILE --video-seconds 20 --excerpts 16 --write w.json

    RRConfig(head_weights=json.loads(Path("weights.json").read_text()))

Read something like what the model is for, in excerpts of some thousands of tokens: memory is that of training on one.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from harness import default_device, finish, machine
from models import add_model_arguments, load_task

from rrattention.config import RULES


def main() -> int:
    arguments = _arguments()
    print(machine(arguments.device))
    task = load_task(arguments, getattr(torch, arguments.dtype), tokens=arguments.tokens)
    print(task.name, flush=True)
    from rrattention.calibration import calibrate  # with transformers, which load_task has mended where need be

    began = time.perf_counter()
    readings = [lambda read=read: read()[0] for read in task.readings]
    try:
        weights = calibrate(task.model, readings, arguments.config, draws=arguments.draws)
    except torch.OutOfMemoryError as error:
        sys.exit(f"calibrate.py: no room for the gradients: read shorter excerpts (--tokens, --video-seconds). {error}")
    except ValueError as error:
        sys.exit(f"calibrate.py: {error} (--tokens, --video-seconds and --world-seconds say how long each is)")
    seconds = time.perf_counter() - began
    for layer, row in enumerate(weights):
        print(f"layer {layer:2}  " + "  ".join(f"{weight:5.2f}" for weight in row))
    arguments.write.write_text(json.dumps(weights), encoding="utf-8")
    least, most = (edge(map(edge, weights)) for edge in (min, max))
    found = {"inputs": task.name, "tau": arguments.tau, "draws": arguments.draws, "least": least, "most": most}
    finish({"benchmark": "calibrate", "machine": machine(arguments.device), **found, "seconds": seconds}, None)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, help="of --text (default: all)")
    parser.add_argument("--rule", choices=RULES, default="default", help="what leaves out the blocks")
    parser.add_argument("--tau", type=float, default=0.8, help="at which much is left out (default: 0.8)")
    parser.add_argument("--draws", type=int, default=4, help="predictions drawn from each reading (default: 4)")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the weights go")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("--model is needed: weights are a model's")
    if not arguments.write.absolute().parent.is_dir():
        parser.error(f"--write: there is no folder {arguments.write.parent}")
    try:
        arguments.config = RULES[arguments.rule](tau=arguments.tau)
    except ValueError as error:
        parser.error(f"--{error}")
    arguments.device = arguments.device or default_device()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
