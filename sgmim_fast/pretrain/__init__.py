"""Pre-training, `sgmim-fast pretrain`.

`config`: what a run is, and the published recipes · `build`: model, optimizer, masks and data of a configuration ·
`task`: them as an `engine.task.Task`, and the command · `pictures`, `export`: what a run leaves, and commands for it.
"""
