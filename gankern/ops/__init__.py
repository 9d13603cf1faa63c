"""Operators: one file a primitive with its schema, argument checks, fake kernels and autograd Functions."""
