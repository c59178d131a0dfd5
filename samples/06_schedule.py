"""Keep some steps and layers dense: most of the layout of a picture is decided in the first steps.

python samples/06_schedule.py [--tiny]

Draws one picture of the embedded model dense, sparse, and by schedules, and prints how far each is from the dense one.
"""

import argparse

import numpy as np
import torch

import gensparse

WINDOW = "clear:radius=3"
SCHEDULES = {  # name: (method, settings of apply)
    "all sparse": (WINDOW, {}),
    "first steps dense": (WINDOW, {"dense_steps": 4}),
    "first steps and first layer dense": (WINDOW, {"dense_steps": 4, "dense_layers": [0]}),
    "dense, wide, narrow": ("schedule:0=dense;0.2=clear:radius=5;0.6=clear:radius=3", {}),
}
CALL = {"negative_prompt": "", "true_cfg_scale": 3.5, "max_sequence_length": 32, "output_type": "np"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="five steps, to try the script itself")
    options = parser.parse_args()
    pipe, steps = gensparse.load_embedded(), 5 if options.tiny else 20

    def picture() -> np.ndarray:
        noise, text = torch.Generator().manual_seed(0), "a red circle left of a blue star on a green background"
        return pipe(text, height=256, width=256, num_inference_steps=steps, generator=noise, **CALL).images[0]

    dense = picture()
    for name, (method, settings) in SCHEDULES.items():
        with gensparse.applied(pipe, method, **settings) as handle:
            error = np.sqrt(np.square(picture() - dense).mean())
        print(f"{name}: {255 * error:.1f} levels from dense, calls {handle.report()['calls']}")
