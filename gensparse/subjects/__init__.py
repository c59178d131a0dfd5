"""Tensor functions of the methods about subjects and regions: masks, statistics, sums over regions."""
