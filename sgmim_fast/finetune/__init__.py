"""Fine-tuning on depth and segmentation, `sgmim-fast finetune`, and its evaluation.

`config`: the configuration, and the published protocols · `build`: creates model, parameter groups, data sets and
metrics · `task`: fine-tuning as an `engine.task.Task`, and the command · `evaluate`: `sgmim-fast evaluate` ·
`encoder`: feature maps of timm encoders · `heads` · `losses`, `metrics` · `inference`: sliding windows ·
`pictures`: figures of predictions · `data`: labelled data sets.
"""
