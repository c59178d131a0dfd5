"""One attention call on several processes: heads divided (Ulysses) or rows of the picture (halo)."""

from gensparse.parallel.team import Team

__all__ = ["Team"]
