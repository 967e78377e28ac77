"""Pre-training, `sgmim-fast pretrain`.

`config`: the configuration, and the published recipes · `build`: creates model, optimizer, masks and data ·
`task`: pre-training as an `engine.task.Task`, and the command · `pictures`: `sgmim-fast reconstruct` · `export`.
"""
