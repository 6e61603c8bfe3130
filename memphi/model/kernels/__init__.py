"""The decoder's steps as Triton kernels, each beside the plain PyTorch that defines it.

Results go into tensors that are given, and nothing is read on the host, so that a CUDA graph can hold it. Triton
is optional: torch brings it where it is built for CUDA on Linux, and without it the definitions can still be imported.
"""
