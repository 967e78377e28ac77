"""Pre-training: from pairs of image and structure map to an encoder. `sgmim-fast pretrain` is its command.

`config`, `presets`: what a run is · `build`: model and data of a configuration · `optimizer`: groups and schedule ·
`order`, `masks`: which images and masks a step has, from the seed alone · `loader`: its batches · `step`: one
optimizer step · `window`, `engine`: the steps between two log lines, and the loop · `stop`: signals · `checkpoint`,
`state`: files, and what goes into them · `runs`: them read again · `log`, `pictures`: what is seen · `pretrain`,
`reconstruct`, `export`: the commands.
"""
