"""The decoder's steps as Triton kernels, each beside the plain PyTorch that defines it.

Every one writes into tensors that it is given and reads nothing on the host, so that a CUDA graph can hold it. Triton
is optional: torch brings it where it is built for CUDA on Linux, and without it the definitions can still be imported.
"""
