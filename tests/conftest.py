"""What every test needs before it is imported."""

import os

# Threads that wait must not spin: on a busy machine that makes short operations tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from rrvideo.compat import mend_torchvision

mend_torchvision()  # before any test imports transformers
torch.set_num_threads(2)
