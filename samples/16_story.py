"""A story: the same subjects in several pictures, turn by turn, kept in a folder and continued by running it again.

python samples/16_story.py --turns story.json --model sdxl --out story
python samples/16_story.py --tiny                                # random weights, seconds on a laptop

What story.json holds is in docs/subjects.md; without it a fox meets a dog.
"""

import argparse
from pathlib import Path

from gensparse.engine.story import StoryRequest, StoryRun
from gensparse.request import GenerateRequest
from gensparse.subjects.story import Story
from gensparse.testing.tiny import tiny_pipeline

MEETING = {
    "subjects": [{"name": "fox", "prompt": "a red fox"}, {"name": "dog"}],
    "turns": [{"prompt": "a fox in the snow"}, {"prompt": "the fox meets a dog"}, {"prompt": "the dog at home"}],
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="random weights, no download")
parser.add_argument("--model", default="sdxl")
parser.add_argument("--turns", type=Path, help="a story file")
parser.add_argument("--out", type=Path, default=Path("story"))
options = parser.parse_args()

story = Story.read(options.turns) if options.turns else Story.of({"seed": 7, **MEETING})
if options.tiny:
    tiny_pipeline("sd15").save_pretrained("tiny-sd15")
base = GenerateRequest(model="./tiny-sd15", steps=2) if options.tiny else GenerateRequest(model=options.model)
run = StoryRun(StoryRequest(story, base), options.out)
run.check()
for number in range(run.count):
    print(run.turn(number).path)
