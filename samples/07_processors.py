"""The diffusers way: a dict of processors, so that only the layers you choose become sparse.

python samples/07_processors.py --tiny
python samples/07_processors.py --model black-forest-labs/FLUX.1-dev --size 2048 --out picture.png
"""

import argparse

import torch
from diffusers import FluxPipeline

import gensparse
from gensparse.methods import Clear
from gensparse.testing.tiny import tiny_call, tiny_flux_pipeline

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--out", default="processors.png")
    options = parser.parse_args()

    if options.tiny:
        pipe, call = tiny_flux_pipeline(double_blocks=2, single_blocks=2), tiny_call("flux")
    else:
        pipe = FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        call = {"prompt": "a lighthouse in a storm", "height": options.size, "width": options.size}

    processors = gensparse.make_processors(pipe.transformer, Clear(radius=2 if options.tiny else 16))
    sparse = {name: value for name, value in processors.items() if name.startswith("single_")}
    pipe.transformer.set_attn_processor({**pipe.transformer.attn_processors, **sparse})
    image = pipe(**{**call, "output_type": "pil"}).images[0]
    print(len(sparse), "of", len(processors), "processors are sparse:", options.out)
    image.save(options.out)
    gensparse.remove(pipe)  # processors become dense again
