"""The operations: autograd.Functions around the kernels, and the choice of implementation."""
