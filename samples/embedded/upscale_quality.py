"""Does upscaling keep a picture? `python samples/embedded/upscale_quality.py --run DIR [--size 4096] [--limit N]`.

Renderings of scenes that no training has seen are enlarged by `gensparse upscale`, without a prompt, and compared with
true renderings of the same scenes at the target size (`gensparse.embedded.faithful`). One line per picture is kept in
DIR/items.jsonl; started again, the run goes on.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from gensparse.embedded.faithful import faithfulness
from gensparse.embedded.quality import bootstrap
from gensparse.embedded.render import render
from gensparse.embedded.scenes import random_scene
from gensparse.engine import OutputOptions, Runner
from gensparse.request import UpscaleRequest

FIRST_SEED = 9_700_000  # scenes that no training has seen
COLUMNS = ("mean", "p999", "psnr", "bicubic", "gain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--native", type=int, default=256)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--limit", type=int, default=4, help="scenes")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--strength", type=float, default=0.3)
    parser.add_argument("--highres", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-faithful", action="store_true", help="without the correction")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    rows, runner = finished(options.run / "items.jsonl"), Runner()
    for seed in range(FIRST_SEED, FIRST_SEED + options.limit):
        key = f"{options.size}/{options.strength}/{options.highres}/{not options.no_faithful}/{seed}"
        if key in rows:
            continue
        source = options.run / f"{seed}-{options.native}.png"
        scene = random_scene(seed)
        Image.fromarray(render(scene, options.native, options.native)).save(source)
        request = UpscaleRequest(
            image=str(source),
            model=options.model,
            size=str(options.size),
            strength=options.strength,
            highres=options.highres,
            dtype=options.dtype,
            faithful=not options.no_faithful,
        )
        place = options.run / (key.replace("/", "_") + ".png")
        start = time.perf_counter()
        output = OutputOptions(paths=(place,), overwrite=True, stages_dir=options.run / "stages")
        runner.execute(request, output)
        seconds = time.perf_counter() - start
        found = faithfulness(Image.open(place), Image.open(source), render(scene, options.size, options.size))
        rows[key] = {name: getattr(found, name) for name in COLUMNS} | {"kept": found.kept, "seconds": seconds}
        with (options.run / "items.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **rows[key]}) + "\n")
        print(key, {name: round(value, 3) for name, value in rows[key].items()}, flush=True)
    report(rows)


def finished(path: Path) -> dict[str, dict]:
    """Lines of earlier runs by key; one that was cut off counts as none."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row.pop("key")] = row
    return rows


def report(rows: dict[str, dict]) -> None:
    """A Markdown table: settings, and means with 95% intervals over the scenes."""
    groups: dict[str, list[dict]] = {}
    for key, row in rows.items():
        groups.setdefault(key.rpartition("/")[0], []).append(row)
    print("| size / strength / way / corrected | scenes | mean | 99.9% below | dB near edges | bicubic | gain |")
    print("|---|---|---|---|---|---|---|")
    for name, members in groups.items():
        cells = []
        for column in COLUMNS:
            found = bootstrap([row[column] for row in members], lambda values: float(np.mean(values)))
            cells.append(f"{found.value:.2f} ({found.low:.2f}..{found.high:.2f})")
        print(f"| {name} | {len(members)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
