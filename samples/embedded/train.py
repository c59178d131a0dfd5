"""Train an embedded model from nothing: `python samples/embedded/train.py --run DIR --minutes 120 [--model unet]`.

Steps: autoencoder, encoded pictures, text encoders alone, denoiser with its text encoders, export. Each step is a
script of its own and is skipped, or continued, when its result is already in DIR. On two CPU cores two hours give a
usable model; more time gives a better one. The UNet takes the shipped autoencoder.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gensparse.embedded import embedded_path

HERE = Path(__file__).parent
SHARDS = {"whole": 10, "native": 6, "close": 6, "wide": 4}
OUT = {"flux": "gensparse/embedded/model", "unet": "gensparse/embedded/unet_model"}


def run(script: str, *arguments: object) -> None:
    """One step in a process of its own; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints, latents and curves")
    parser.add_argument("--model", choices=OUT, default="flux")
    parser.add_argument("--out", type=Path, help="pipeline folder; the shipped one without")
    parser.add_argument("--minutes", type=float, default=120, help="for the denoiser")
    parser.add_argument("--autoencoder-minutes", type=float, default=10)
    parser.add_argument("--compile", action="store_true", help="faster steps after minutes of compiling")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    unet = args.model == "unet"
    if not (args.run / "vae").exists():
        if unet:
            shutil.copytree(embedded_path() / "vae", args.run / "vae")
        else:
            run("autoencoder", "--run", args.run, "--minutes", args.autoencoder_minutes)
    shards = [f"{kind}={count}" for kind, count in SHARDS.items()]
    run("encode", "--run", args.run, "--workers", os.cpu_count() or 1, "--shards", *shards)
    if not (args.run / "text.pt").exists():
        run("text_meaning", "--run", args.run, "--model", args.model)
    options = ["--minutes", args.minutes, *(["--compile"] if args.compile else [])]
    if unet:
        run("unet", "--run", args.run, "--decay-minutes", args.minutes / 3, *options)
    else:
        run("transformer", "--run", args.run, *options)
    run("export", "--run", args.run, "--model", args.model, "--out", args.out or OUT[args.model])


if __name__ == "__main__":
    main()
