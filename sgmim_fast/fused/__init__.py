"""timm's blocks through fused ops.

`blocks`: the classes that a module is given · `unmodified`: whether what they and the branch bypass is still timm's and
PyTorch's own · `accelerate`: the function.
"""
