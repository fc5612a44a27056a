"""The operators in Triton, one a file. Only this folder imports Triton.

A file holds jit functions, which know nothing of torch, and launchers, which allocate, choose
blocks by plain functions of the shape, and launch. Arguments are checked in ``ops``; kernels trust.
"""
