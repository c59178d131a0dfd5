"""The same line makes any supported family sparse: SDXL's UNet, SD3's joint attention, Wan's videos.

python samples/05_swap_any_family.py --tiny                       # random weights of all of them, seconds on a laptop
python samples/05_swap_any_family.py --family wan --prompt "a sailing boat, waves"
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import gensparse
from gensparse.testing.tiny import tiny_call, tiny_pipeline

FAMILIES = {  # repository, method, size of the call
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "msw_msa", {"height": 2048, "width": 2048}),
    "sd3": ("stabilityai/stable-diffusion-3.5-large", "neighborhood:window=32", {"height": 1440, "width": 1440}),
    "wan": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "radial", {"height": 768, "width": 1280, "num_frames": 69}),
}
TINY = {"sdxl": "msw_msa", "sd3": "neighborhood:window=3", "wan": "sliding_window:radius=1"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--prompt", default="a lighthouse in a storm")
    options = parser.parse_args()
    for family in FAMILIES if options.tiny else [options.family]:
        repository, method, call = FAMILIES[family]
        if options.tiny:
            pipe, method, call = tiny_pipeline(family), TINY[family], tiny_call(family)
        else:
            pipe = DiffusionPipeline.from_pretrained(repository, dtype=torch.bfloat16)
            pipe.enable_model_cpu_offload()
        with gensparse.applied(pipe, method) as handle:
            pipe(**{**call, "prompt": options.prompt})
        print(family, method, handle.report())
