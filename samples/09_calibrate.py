"""Measure what every attention head of a model loses under a window, then let `auto` pick a window per head.

python samples/09_calibrate.py [--tiny] [--out profile.json]

Shown on the embedded model at its native size. For a model of yours, put the profile into its folder as
attention_profile.json: `--attention auto` finds it there.
"""

import argparse

import torch

import gensparse
from gensparse.calibrate import calibrate
from gensparse.methods import Auto

PROMPT = "a red circle left of a blue star on a green striped background"
CALL = {"negative_prompt": "", "true_cfg_scale": 3.5, "max_sequence_length": 32, "height": 256, "width": 256}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two steps, to try the script itself")
    parser.add_argument("--out", default="profile.json")
    options = parser.parse_args()
    pipe, steps = gensparse.load_embedded(), 2 if options.tiny else 20

    def picture() -> None:
        pipe(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **CALL)

    profile = calibrate(pipe, picture)
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(profile.to_json())
    for error in (0.1, 0.3, 0.6):
        with gensparse.applied(pipe, Auto(error=error, dense_below=0, profile=options.out)) as handle:
            picture()
        report = handle.report()
        print(f"error {error}: density {report['density']}, sparse {report['sparse']}, dense {report['dense']}")
