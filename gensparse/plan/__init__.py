"""Plans: a pattern on a layout, lowered to the integer tensors that kernels read."""

from gensparse.plan.build import Plan, build_plan
from gensparse.plan.routed import ClusterPlan, RouteContext, RoutedPlan

__all__ = ["ClusterPlan", "Plan", "RouteContext", "RoutedPlan", "build_plan"]
