"""A larger picture whose parts follow prompts of their own: C-Upscale.

python samples/13_regional_prompts.py --image small.png --prompt "a harbour town" --regions regions.json
python samples/13_regional_prompts.py --image small.png --prompt "a harbour town" --captions folder/of/a/vision-model
python samples/13_regional_prompts.py --tiny                     # random weights, seconds on a laptop

regions.json: [{"box": [0, 0, 1, 0.5], "prompt": "red roofs, chimneys"}, ...], left, top, right, bottom from 0 to 1.
"""

import argparse

import torch
from PIL import Image

from gensparse.pipelines import CUpscale, SDXLHighresPipeline, VisionCaptioner
from gensparse.testing.tiny import tiny_pipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
parser.add_argument("--prompt", default="a harbour town in the evening")
parser.add_argument("--image", help="the picture to enlarge; without it one is drawn first")
parser.add_argument("--size", type=int, default=2048)
parser.add_argument("--regions", help="a JSON file of boxes and prompts")
parser.add_argument("--captions", help="folder of a vision-language model that describes every window")
options = parser.parse_args()

regions = VisionCaptioner(options.captions) if options.captions else options.regions or ()
if options.tiny:
    pipe, size, steps = SDXLHighresPipeline.from_pipe(tiny_pipeline("sdxl")), (72, 104), 2
    regions = [{"box": [0, 0, 1, 0.5], "prompt": "clouds"}, {"box": [0, 0.5, 1, 1], "prompt": "a harbour"}]
else:
    pipe = SDXLHighresPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    size, steps = (options.size, options.size), 50
pipe.set_progress_bar_config(disable=options.tiny)
image = Image.open(options.image) if options.image else None
pipe(options.prompt, image=image, height=size[0], width=size[1], num_inference_steps=steps,
     generator=torch.Generator().manual_seed(0), highres=CUpscale(regions)).images[0].save("regions.png")  # fmt: skip
print("regions.png")
