"""Tests that run the Triton kernels in Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether functions are compiled or interpreted, and other tests import it too (torch
does, when it compiles). So these modules are collected only by a process that was started with TRITON_INTERPRET=1;
tests/kernels/test_triton_interpreted.py starts one.
"""

from gensparse.kernels.triton import interpreted

collect_ignore_glob = [] if interpreted() else ["test_*.py"]
