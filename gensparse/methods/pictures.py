"""The rule of references that window methods share, for models that edit pictures."""

from gensparse.layout import Layout
from gensparse.patterns import Aligned, Pattern, Text


def over_pictures(window: Pattern, layout: Layout) -> Pattern:
    """`window | Text()`, and where the sequence holds references (Kontext, edit models) their rule.

    - A reference of the target's grid is seen through the window at the same position, which is where the rotary
      embedding puts what it shows, and sees itself and the target through the same window.
    - A reference of another grid has no such position: the target sees all of it, and it sees the whole target, itself
      and all other references. It costs target tokens times reference tokens; edit models scale references to about
      one megapixel, whatever the target's size.
    - Text sees all pictures and is seen by all.

    So an edit keeps what the reference shows at its place, a subject from elsewhere stays visible everywhere, and a
    window over the grid is exactly the model's own attention. No model was trained for it.
    """
    if not any(segment.kind == "reference" for segment in layout.segments):
        return window | Text()
    return Aligned(window) | Text()
