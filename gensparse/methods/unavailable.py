"""Published methods that users look for and cannot have, and why."""

UNAVAILABLE: dict[str, str] = {
    "customcontrast": (
        "CustomContrast (arXiv 2409.05606) is a trained subject encoder of which neither code nor weights are public; "
        "its features would enter as image prompts do, so take mip_adapter for several subjects by reference images"
    ),
}
"""Name -> reason, in a sentence without a stop."""
