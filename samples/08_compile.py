"""Sparse attention under torch.compile: apply first, then compile the repeated blocks.

python samples/08_compile.py --tiny
python samples/08_compile.py --model black-forest-labs/FLUX.1-dev --size 2048
"""

import argparse
import time

import torch
from diffusers import FluxPipeline

import gensparse
from gensparse.testing.tiny import tiny_call, tiny_flux_pipeline

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no compiler: only the graphs are traced")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--size", type=int, default=2048)
    options = parser.parse_args()

    if options.tiny:
        pipe, method, call = tiny_flux_pipeline(), "clear:radius=2", tiny_call("flux")
    else:
        pipe = FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
        method, call = "clear:radius=16", {"prompt": "a lighthouse", "height": options.size, "width": options.size}

    handle = gensparse.apply(pipe, method)
    blocks = gensparse.compile_blocks(pipe, backend="eager" if options.tiny else "inductor")
    for run in ("first, with compilation", "second"):
        start = time.perf_counter()
        pipe(**call)
        print(f"{run}: {time.perf_counter() - start:.2f} s")
    print(blocks, "blocks compiled;", handle.report())
