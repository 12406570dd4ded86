"""Find out when something happens in a video, and write the times to a CSV file.

    python demos/analytics.py                        # when is the pink triangle there? In the sample video, in seconds
    python demos/analytics.py match.mp4 "Is a goal scored? Answer yes or no." --every 30 --window 60 \
        --model Qwen/Qwen2-VL-7B-Instruct --out goals.csv

Windows in which it happens, one after the other, are one moment; what cannot be seen is in none.
"""

import argparse
import csv
import sys
from itertools import groupby
from pathlib import Path

from rrvideo import VideoQA
from rrvideo.cli import SAMPLE
from rrvideo.video import format_time

parser = argparse.ArgumentParser(description="Find out when something happens in a video.")
parser.add_argument("video", nargs="?", default=SAMPLE)
parser.add_argument("question", nargs="?", default="Is there a pink triangle?", help="one to answer with yes or no")
parser.add_argument("--every", type=float, default=5.0, help="seconds from one look to the next (default: 5)")
parser.add_argument("--window", type=float, default=5.0, help="seconds that one look takes in (default: 5)")
parser.add_argument("--sure", type=float, default=0.5, help="how probable yes must be (default: 0.5)")
parser.add_argument("--model", default="tiny")
parser.add_argument("--out", type=Path, default=Path("moments.csv"))
arguments = parser.parse_args()

qa = VideoQA.load(arguments.model)
scan = qa.scan(
    arguments.video,
    {"happens": arguments.question},
    schema={"happens": "yes/no"},
    every=arguments.every,
    window=arguments.window,
)

with arguments.out.open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["from", "to", "probability"])
    for happens, windows in groupby(scan, key=lambda window: (window["happens"].probability or 0) >= arguments.sure):
        if happens:
            moment = list(windows)
            highest = max(window["happens"].probability for window in moment)
            table.writerow([format_time(moment[0].start), format_time(moment[-1].end), f"{highest:.2f}"])

sys.stdout.write(arguments.out.read_text())
