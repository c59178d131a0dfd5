"""Plans: a pattern on a layout, lowered to the integer tensors that kernels read."""

from gensparse.plan.build import Plan, build_plan

__all__ = ["Plan", "build_plan"]
