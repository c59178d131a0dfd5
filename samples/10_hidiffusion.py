"""Whole pictures of Stable Diffusion at two to four times its training size, without new weights: HiDiffusion.

python samples/10_hidiffusion.py --prompt "a lighthouse in a storm" --size 2048
python samples/10_hidiffusion.py --tiny                          # random weights, seconds on a laptop

Draws the same picture with the plain UNet and with HiDiffusion, and tells what changed in which steps.
"""

import argparse
import time

import torch
from diffusers import DiffusionPipeline

import gensparse
from gensparse.testing.tiny import tiny_pipeline

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompt", default="a lighthouse in a storm")
    parser.add_argument("--size", type=int, default=2048)
    options = parser.parse_args()
    if options.tiny:
        pipe, size, steps = tiny_pipeline("sdxl"), 64, 8
    else:
        pipe, size, steps = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16), options.size, 50
        pipe.enable_model_cpu_offload()

    def draw(name: str) -> None:
        noise, start = torch.Generator().manual_seed(0), time.perf_counter()
        pipe(options.prompt, height=size, width=size, num_inference_steps=steps, generator=noise).images[0].save(name)
        print(name, f"{time.perf_counter() - start:.1f} s")

    draw("plain.png")
    with gensparse.applied(pipe, "hidiffusion") as handle:
        draw("hidiffusion.png")
        print(handle.report()["raunet"], handle.report()["sparse"], "windowed layers")
