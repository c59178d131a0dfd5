"""An SDXL picture of any size in stages, or a larger version of your own.

python samples/11_sdxl_highres.py --prompt "a lighthouse in a storm" --width 3072 --height 2048
python samples/11_sdxl_highres.py --image small.png --highres freescale --strength 0.5
python samples/11_sdxl_highres.py --tiny                         # random weights, seconds on a laptop
"""

import argparse

import torch
from PIL import Image

from gensparse.pipelines import SDXLHighresPipeline
from gensparse.testing.tiny import tiny_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a lighthouse in a storm")
parser.add_argument("--height", type=int, default=2048)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--highres", default="cascade", help="cascade, freescale, demofusion, rectifiedhr or none")
parser.add_argument("--image", help="a picture to enlarge")
parser.add_argument("--strength", type=float)
options = parser.parse_args()

if options.tiny:
    pipe, size, steps = SDXLHighresPipeline.from_pipe(tiny_pipeline("sdxl")), (72, 104), 3
else:
    pipe = SDXLHighresPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    size, steps = (options.height, options.width), 50
more = {"image": Image.open(options.image), "strength": options.strength} if options.image else {}
noise = torch.Generator().manual_seed(0)
pipe.set_progress_bar_config(disable=options.tiny)
pipe(options.prompt, height=size[0], width=size[1], num_inference_steps=steps, highres=options.highres,
     generator=noise, **more).images[0].save("sdxl.png")  # fmt: skip
print("sdxl.png", [(r["width"], r["height"], r["method"]) for r in pipe.attention_report])
