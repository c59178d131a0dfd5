"""Two subjects in one picture, each by a picture of it: no masks, no places, no training.

python samples/14_customize.py                                  # the shipped model, and two pictures drawn for it
python samples/14_customize.py --model flux-folder --prompt "a cat on a dog" --subject cat=cat.png --subject dog=dog.png
python samples/14_customize.py --tiny                           # random weights, seconds on a laptop
"""

import argparse

import torch
from diffusers import FluxPipeline
from PIL import Image

from gensparse import Reference
from gensparse.embedded import embedded_path, load_folder
from gensparse.embedded.render import render
from gensparse.embedded.scenes import Scene, Subject
from gensparse.pipelines import FluxCustomizePipeline
from gensparse.testing.tiny import tiny_pipeline

STAR = Scene((Subject("star", "red", "dotted", "large", 0.4, 0.55, 0.3, 15.0),), "plain", "white")
SQUARE = Scene((Subject("square", "blue", "striped", "large", 0.6, 0.5, 0.3, -15.0),), "wavy", "yellow")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", help="a FLUX.1 checkpoint")
parser.add_argument("--prompt", default="a star left of a square on a green background")
parser.add_argument("--subject", action="append", metavar="NAME=IMAGE", help="repeat; the prompt says the names")
options = parser.parse_args()

read, shipped = FluxPipeline.from_pretrained, not (options.tiny or options.model)
stock = tiny_pipeline("flux") if options.tiny else load_folder(embedded_path(), torch.float32) if shipped else None
pipe = FluxCustomizePipeline.from_pipe(stock or read(options.model, torch_dtype=torch.bfloat16))
given = [text.split("=", 1) for text in options.subject or ()]
subjects = [Reference(name, Image.open(path)) for name, path in given]
subjects = subjects or [Reference(scene.subjects[0].shape, render(scene, 512, 512)) for scene in (STAR, SQUARE)]
call = {"negative_prompt": "", "true_cfg_scale": 3.5, "num_inference_steps": 20} if shipped else {}
call |= {"height": 32, "width": 32, "num_inference_steps": 2, "highres": "none"} if options.tiny else {}
image = pipe(options.prompt, subjects=subjects, generator=torch.Generator().manual_seed(3), **call).images[0]
image.save("customized.png")
print("customized.png", pipe.attention_report[0]["subjects"]["found"])
