"""A 4096 x 4096 picture with the embedded model: native draft, then the cascade with CLEAR's disc attention.

python samples/02_generate_4k.py [--tiny] [--output picture.png]
"""

import argparse

import torch

import gensparse
from gensparse.pipelines import FluxHighresPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="512 pixels and two steps, to try the script itself")
parser.add_argument("--output", default="picture.png")
options = parser.parse_args()

pipe = FluxHighresPipeline.from_pipe(gensparse.load_embedded())
side, steps = (512, 2) if options.tiny else (4096, None)
picture = pipe(
    "a red circle left of a blue star on a green striped background",
    negative_prompt="",
    true_cfg_scale=3.0,
    height=side,
    width=side,
    num_inference_steps=steps,
    attention="clear:radius=8",
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save(options.output)
print(options.output)
