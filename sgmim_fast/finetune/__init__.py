"""Fine-tuning on depth and segmentation, `sgmim-fast finetune`, and its evaluation.

`config`: what a run is, and the published protocols · `build`: model, optimizer groups, data sets and metrics of a
configuration · `task`: them as an `engine.task.Task`, and the command · `evaluate`: the other command · `encoder`,
`weights`: a timm encoder's maps, from weights of other sizes · `heads` · `losses`, `metrics` · `inference` · `data`.
"""
