"""Keep some steps and layers dense: most of the layout of a picture is decided in the first steps.

python samples/06_schedule.py [--tiny]

Draws one picture of the embedded model dense, sparse, and sparse with dense first steps and a dense first layer, and
prints how far the two are from the dense one.
"""

import argparse

import numpy as np
import torch

import gensparse

SCHEDULES = {
    "all sparse": {},
    "first steps dense": {"dense_steps": 4},
    "first and last steps dense": {"dense_steps": 3, "dense_last_steps": 1},
    "first steps and first layer dense": {"dense_steps": 4, "dense_layers": [0]},
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
    for name, schedule in SCHEDULES.items():
        with gensparse.applied(pipe, "clear:radius=3", **schedule) as handle:
            error = np.sqrt(np.square(picture() - dense).mean())
        print(f"{name}: {255 * error:.1f} levels from dense, calls {handle.report()['calls']}")
