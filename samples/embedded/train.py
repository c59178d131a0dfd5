"""Train the embedded model from nothing: `python samples/embedded/train.py --run DIR --minutes 120`.

Steps: autoencoder, tokenised captions and encoded pictures, transformer with its text encoders, export. Each step is a
script of its own and is skipped, or continued, when its result is already in DIR. On two CPU cores two hours give a
usable model; more time gives a better one, because the schedule of the transformer follows `--minutes`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARDS = {"whole": 10, "native": 6, "close": 6, "wide": 4}


def run(script: str, *arguments: object) -> None:
    """One step in a process of its own; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints, latents and curves")
    parser.add_argument("--out", type=Path, default=Path("gensparse/embedded/model"))
    parser.add_argument("--minutes", type=float, default=120, help="for the transformer")
    parser.add_argument("--autoencoder-minutes", type=float, default=10)
    parser.add_argument(
        "--compile", action="store_true", help="about 1.35 times faster steps after minutes of compiling"
    )
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if not (args.run / "vae").exists():
        run("autoencoder", "--run", args.run, "--minutes", args.autoencoder_minutes)
    for kind, shards in SHARDS.items():
        run("encode", "--run", args.run, "--kind", kind, "--shards", shards)
    options = ["--compile"] if args.compile else []
    run("transformer", "--run", args.run, "--minutes", args.minutes, *options)
    run("export", "--run", args.run, "--out", args.out)


if __name__ == "__main__":
    main()
