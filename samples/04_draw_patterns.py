"""Draw what one token sees under every kind of pattern: the gallery of docs/patterns.md.

python samples/04_draw_patterns.py --out docs/images/patterns
python samples/04_draw_patterns.py --tiny
"""

import argparse
from pathlib import Path

from gensparse import Layout
from gensparse import patterns as p

PICTURE, CLIP = Layout.image(24, 36, text=8), Layout.video(8, 12, 18, text=8)
PER_HEAD = p.PerHead((p.Stripes(4, "vertical"), p.Stripes(4, "horizontal")))
GUIDED = Layout.joint((1, 24, 36), text=8, references=[(1, 6, 9)])
GALLERY = {
    "disc": (p.Disc(8) | p.Text(), PICTURE, (9, 12)),
    "box": (p.Box(6), PICTURE, (3, 30)),
    "neighborhood": (p.Neighborhood(13), PICTURE, (3, 30)),
    "dilated": (p.Neighborhood(7, dilation=3), PICTURE, (12, 17)),
    "blocks": (p.Blocks(8, shift=4), PICTURE, (9, 14)),
    "wrapped": (p.Blocks(8, shift=4, wrap=True), PICTURE, (1, 34)),
    "grid": (p.Grid((6, 9)), PICTURE, (9, 14)),
    "criss-cross": (p.CrissCross(), PICTURE, (9, 14)),
    "stripes": (PER_HEAD, PICTURE, (9, 14)),
    "clear": (p.Disc(8) | p.Text() | p.Pooled(4), PICTURE, (9, 12)),
    "anchors": (p.Anchors(8, neighbours="3x3"), GUIDED, (9, 14)),
    "radial": (p.Radial(decay=0.2, block=16), CLIP, (2, 5, 8)),
}
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small pictures")
    parser.add_argument("--out", type=Path, default=Path("patterns"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (pattern, layout, query) in GALLERY.items():
        picture = pattern.draw(layout, query, scale=3 if options.tiny else 8)
        picture.save(options.out / f"{name}.png", optimize=True)
        print(options.out / f"{name}.png")
