"""Pre-training, `sgmim-fast pretrain`.

`config`: the configuration, and the published recipes · `build`: creates model, optimizer, masks and data ·
`task`: pre-training as an `engine.task.Task`, and the command · `initial`: loads initial weights · `probe`: linear
probe of frozen features · `pictures`: `sgmim-fast reconstruct` · `export`: `sgmim-fast export` · `tune`.
"""
