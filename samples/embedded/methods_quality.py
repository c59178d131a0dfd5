"""Measure every method on the embedded model: `python samples/embedded/methods_quality.py --run DIR [--limit N]`.

Every method continues the same native drafts to `--size` pixels through the cascade, whose larger stages it computes.
Two numbers per method, with 95% intervals over the prompts: the share of right attributes, and the PSNR against the
picture that dense attention makes of the same draft. Finished pictures are kept; started again, the run goes on.
`--out docs/benchmarks/methods_quality.csv` writes the table that docs/methods.md shows. Methods for several subjects
come from what `gensparse bench subjects` has measured: `--subjects DIR/subjects.csv`, methods for UNets from what
`gensparse bench quality -m embedded-unet` has: `--unet DIR/quality.csv`.
"""

import argparse
import csv
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from gensparse.bench.pictures import Item, Maker, load_pipeline, prompts
from gensparse.bench.quality import Options, Store, run_item
from gensparse.bench.subjects import PLAIN, RENDERING, SHARED
from gensparse.embedded.quality import Interval, bootstrap, share_right
from gensparse.embedded.reader import Reader
from gensparse.methods import METHODS as METHODS_BY_NAME
from gensparse.methods import parse_method

DENSE = "dense"
# windows of about a quarter of the side at 1024 pixels (64 x 64 tokens); methods for other models have no row
METHODS = (
    "clear:radius=8",
    "clear:radius=8,down_factor=4",
    "neighborhood:window=16x16",
    "sliding_window:radius=8",
    "double_window:window=16",
    "long_distance:group=8,interval=8",
    "freeswim_window:half=8x8",
    "hilo:window=4",
    "proxy:window=8",
    "biformer:regions=8,top=8",
    "psa:block=64",
    "agentsd:cell=4",
    "auto:density=0.08,dense_below=0",  # as many pairs as a window of radius 8
    "auto:dense_below=0",
)
JUDGED = {
    "score %": "pictures with both subjects right, unmixed, not copied %",
    "colours %": "right colours of subjects %",
    "fills %": "right fills of subjects %",
}
OF_UNETS = ("right attributes %", "right count %")
COLUMNS = ("attention", "size", "prompts", "measure", "value", "low", "high", "commit")


def psnr(picture: Path, reference: Path) -> float:
    """Decibels between two PNG files of equal size; 99 for equal ones."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), np.float64) for path in (picture, reference))
    error = float(((a - b) ** 2).mean())
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def rows(store: Store, options: argparse.Namespace) -> list[dict[str, str]]:
    """The finished part of the table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    wanted, table = prompts(options.limit), []
    for method in (DENSE, *METHODS):
        items = [Item(str(options.size), method, prompt) for prompt in wanted]
        done = [item for item in items if item.key in store.rows]
        if not done:
            continue
        scores = [store.rows[item.key]["scores"] for item in done]
        shares = bootstrap(scores, share_right)
        numbers = {"right attributes %": Interval(*(100 * x for x in (shares.value, shares.low, shares.high)))}
        if method != DENSE:
            twins = [Item(item.size, DENSE, item.prompt) for item in done]
            pairs = [(store.picture_path(a), store.picture_path(b)) for a, b in zip(done, twins, strict=True)]
            numbers["PSNR against dense dB"] = bootstrap([psnr(a, b) for a, b in pairs if b.exists()], mean)
        for measure, item in numbers.items():
            cells = (method, options.size, len(done), measure, *(f"{x:.1f}" for x in (item.value, item.low, item.high)))
            table.append(dict(zip(COLUMNS, (*map(str, cells), commit), strict=True)))
    return table


def of_subjects(path: Path) -> list[dict[str, str]]:
    """Rows of the table of `gensparse bench subjects` for contenders that are methods."""
    table = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["against"] or row["contender"] in (PLAIN, SHARED, RENDERING) or row["measure"] not in JUDGED:
                continue
            told = (row["contender"], row["size"], row["pictures"], JUDGED[row["measure"]])
            values = (*told, row["value"], row["low"], row["high"], row["commit"])
            table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def of_unet(path: Path) -> list[dict[str, str]]:
    """Rows of the table of `gensparse bench quality` for contenders that are methods, alone or as a way."""
    table = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            method = row["contender"].removesuffix("+auto")
            if method.partition(":")[0] not in METHODS_BY_NAME or row["measure"] not in OF_UNETS:
                continue
            told = (method, row["size"], row["pictures"], f"{row['measure']} of {row['model']}")
            values = (*told, *(f"{float(row[name]):.1f}" for name in ("value", "low", "high")), row["commit"])
            table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24, help="prompts")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--subjects", type=Path, help="subjects.csv of `gensparse bench subjects`")
    parser.add_argument("--unet", type=Path, help="quality.csv of `gensparse bench quality -m embedded-unet`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    options = parser.parse_args()
    for method in METHODS:
        parse_method(method)
    store, reader = Store(options.run), Reader.load()
    store.check_settings({name: str(getattr(options, name)) for name in ("size", "dtype", "steps", "guidance")})
    run = Options(run=options.run, steps=options.steps, guidance=options.guidance, dtype=options.dtype)
    maker = Maker(run, store)
    maker.loaded = load_pipeline(run)
    for prompt in prompts(options.limit):
        for method in (DENSE, *METHODS):
            item = Item(str(options.size), method, prompt)
            if item.key not in store.rows:
                run_item(item, maker, reader, store)
    table = rows(store, options)
    table += [] if options.subjects is None else of_subjects(options.subjects)
    table += [] if options.unet is None else of_unet(options.unet)
    if options.out is not None:
        with open(options.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in table if row["attention"] != DENSE)
    for row in table:
        print(" | ".join(row.values()))


if __name__ == "__main__":
    main()
