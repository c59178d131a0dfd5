"""Measure the embedded model: `python samples/embedded/quality.py --run DIR [--only SIZE] [--limit N]`.

The same as `gensparse bench quality`; what is measured, and beside what, stands in `gensparse.bench.quality`.
"""

from gensparse.bench.quality import main

if __name__ == "__main__":
    main()
