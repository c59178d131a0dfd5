"""A large picture with Stable Diffusion 3.5, QwenImage or FLUX: in a cascade, or at once with stretched positions.

python samples/12_flow_highres.py --model Qwen/Qwen-Image --width 3840 --height 2160 --highres direct
python samples/12_flow_highres.py --model stabilityai/stable-diffusion-3.5-large --image small.png --strength 0.5
python samples/12_flow_highres.py --tiny                         # random weights, seconds on a laptop
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from gensparse.pipelines import highres_class
from gensparse.testing.tiny import tiny_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", default="stabilityai/stable-diffusion-3.5-large")
parser.add_argument("--prompt", default="a lighthouse in a storm")
parser.add_argument("--height", type=int, default=2048)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--highres", default="cascade", help="cascade, direct (not Stable Diffusion 3) or none")
parser.add_argument("--image", help="a picture to enlarge")
parser.add_argument("--strength", type=float)
options = parser.parse_args()

read = DiffusionPipeline.from_pretrained
loaded = tiny_pipeline("sd3") if options.tiny else read(options.model, dtype=torch.bfloat16)
pipe = highres_class(loaded).from_pipe(loaded)
size, steps = (60, 84) if options.tiny else (options.height, options.width), 3 if options.tiny else None
if not options.tiny:
    pipe.enable_model_cpu_offload()
more = {"image": Image.open(options.image), "strength": options.strength} if options.image else {}
pipe.set_progress_bar_config(disable=options.tiny)
pipe(options.prompt, negative_prompt=" ", height=size[0], width=size[1], num_inference_steps=steps, **more,
     highres=options.highres, generator=torch.Generator().manual_seed(0)).images[0].save("flow.png")  # fmt: skip
print("flow.png", [(r["width"], r["height"], r["method"]) for r in pipe.attention_report])
