"""Attention kernels: functions of tensors and numbers, without layouts, patterns or plans."""
