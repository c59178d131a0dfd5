"""Two subjects in one picture, each by a picture of it: no masks, no places, no training.

python samples/14_customize.py                                  # the shipped model, and two pictures drawn for it
python samples/14_customize.py --model black-forest-labs/FLUX.1-dev --prompt "a cat and a dog on a lawn" \
    --subject cat=cat.png --subject dog=dog.png --size 2048
python samples/14_customize.py --tiny                           # the same on random weights, seconds on a laptop
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

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", help="FLUX.1 checkpoint (the shipped model)")
parser.add_argument("--subject", action="append", metavar="NAME=IMAGE", help="repeat; the prompt says the names")
parser.add_argument("--prompt", default="a star left of a square on a green background")
parser.add_argument("--method", default="isolation", help="or freecustom, storydiffusion ...")
parser.add_argument("--size", type=int, help="pixels per side (the model's own)")
parser.add_argument("--seed", type=int, default=3)
options = parser.parse_args()

if options.subject:
    given = [text.split("=", 1) for text in options.subject]
    subjects = [Reference(name, Image.open(path)) for name, path in given]
else:
    star = Scene((Subject("star", "red", "dotted", "large", 0.4, 0.55, 0.3, 15.0),), "plain", "white")
    square = Scene((Subject("square", "blue", "striped", "large", 0.6, 0.5, 0.3, -15.0),), "wavy", "yellow")
    subjects = [Reference(scene.subjects[0].shape, render(scene, 512, 512)) for scene in (star, square)]

call = {"height": options.size, "width": options.size}
if options.tiny:
    loaded, call = tiny_pipeline("flux"), {"height": 32, "width": 32, "num_inference_steps": 2, "highres": "none"}
elif options.model:
    loaded = FluxPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    loaded.enable_model_cpu_offload()
else:
    loaded = load_folder(embedded_path(), torch.float32)
    call |= {"negative_prompt": "", "true_cfg_scale": 3.5, "num_inference_steps": 20}  # its guidance is true guidance
pipe = FluxCustomizePipeline.from_pipe(loaded)
generator = torch.Generator().manual_seed(options.seed)
pipe(options.prompt, subjects=subjects, subject_method=options.method, generator=generator, **call).images[0].save(
    "customized.png"
)
told = pipe.attention_report[0]["subjects"]
print("customized.png", told.get("found"), told.get("cut out"))
