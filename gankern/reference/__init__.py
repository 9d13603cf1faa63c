"""What is right: one plain-PyTorch file a primitive, differentiable to any order. Imports nothing of gankern's."""
