"""Two subjects in one picture, each in its place and with its own prompt, on SDXL, Stable Diffusion 1.5 or FLUX.

python samples/15_regions.py --layout scene.json --prompt "a cat and a dog on a lawn"
python samples/15_regions.py --tiny                              # random weights, seconds on a laptop

A layout file is a list of {"subject": name, "box": [x0, y0, x1, y1]}, boxes in shares of width and height.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import gensparse
from gensparse.methods import Regional, Together
from gensparse.testing.tiny import tiny_pipeline

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompt", default="a cat and a dog on a lawn, photograph")
    parser.add_argument("--layout", help="layout file; without it the cat is left and the dog right")
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    if options.tiny:
        pipe, size, steps = tiny_pipeline("sdxl"), 32, 2
    else:
        pipe, size, steps = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16), options.size, 30
        pipe.enable_model_cpu_offload()
    sides = [{"prompt": "a cat", "box": [0, 0.2, 0.5, 1]}, {"prompt": "a dog", "box": [0.5, 0.2, 1, 1]}]
    regions = Regional(options.layout or sides)
    joint = hasattr(pipe, "transformer")  # text and picture in one sequence: the regions are its pattern
    with gensparse.applied(pipe, regions if joint else Together(("sliding_window:radius=32", regions))) as handle:
        pipe(options.prompt, height=size, width=size, num_inference_steps=steps).images[0].save("regions.png")
        print("regions.png", handle.report()["calls"])
