"""timm's blocks, and those of the published code, through fused ops.

`blocks`, `eva_blocks`, `published_blocks`: the classes that a module is given · `unmodified`: whether what they and the
branch bypass is still timm's and PyTorch's own · `accelerate`: the function.
"""
