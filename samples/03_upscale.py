"""A picture of your own, twice as large and faithful: the cascade entered with an image.

python samples/03_upscale.py INPUT.png [--tiny] [--output larger.png]
"""

import argparse

import torch
from PIL import Image

import gensparse
from gensparse.pipelines import FluxHighresPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("input", nargs="?", help="default: a native picture drawn by the embedded model")
parser.add_argument("--tiny", action="store_true", help="two steps, to try the script itself")
parser.add_argument("--output", default="larger.png")
options = parser.parse_args()

pipe = FluxHighresPipeline.from_pipe(gensparse.load_embedded())
prompt, steps = "a yellow moon on a blue background", 2 if options.tiny else None
if options.input:
    picture = Image.open(options.input).convert("RGB")
else:
    picture = pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images[0]
larger = pipe(
    prompt if not options.input else "",
    image=picture,
    height=2 * picture.height,
    width=2 * picture.width,
    num_inference_steps=steps,
    strength=0.4,
    generator=torch.Generator().manual_seed(0),
).images[0]
larger.save(options.output)
print(options.output)
