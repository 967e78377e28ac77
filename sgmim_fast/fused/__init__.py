"""Blocks of timm and of the published code that compute their forward through fused ops.

`swin_blocks`, `vit_blocks`, `eva_blocks`, `published_blocks`: the classes, with their base in `block` · `stem`: patch
embedding · `unmodified`: checks that bypassed modules are unmodified · `accelerate`: the public function.
"""
