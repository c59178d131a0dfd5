"""Make a FLUX pipeline sparse with one line, look at what ran, undo it.

python samples/01_swap_attention.py --tiny                 # random weights, seconds on a laptop
python samples/01_swap_attention.py --model black-forest-labs/FLUX.1-dev --size 2048
"""

import argparse

import torch
from diffusers import FluxPipeline

import gensparse
from gensparse.methods import Clear
from gensparse.testing.tiny import tiny_flux_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights, no download")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--prompt", default="a lighthouse in a storm")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--out", default="swapped.png")
    options = parser.parse_args()

    if options.tiny:
        pipe, size, call = tiny_flux_pipeline(), 64, {"num_inference_steps": 2, "max_sequence_length": 16}
    else:
        pipe, size, call = FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16), options.size, {}
        pipe.enable_model_cpu_offload()

    handle = gensparse.apply(pipe, Clear(radius=4 if options.tiny else 16))
    image = pipe(options.prompt, height=size, width=size, **call).images[0]
    print(handle.report(), options.out)
    handle.remove()
    image.save(options.out)


if __name__ == "__main__":
    main()
