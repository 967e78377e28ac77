"""Training: pre-training, and the engine that fine-tuning shares. `sgmim-fast pretrain` is the command.

`settings`: a configuration from presets, files and options · `task`: what the engine does not know about what it
trains · `loader`, `order`: batches, and which images a step has, from the seed alone · `step`: one optimizer step ·
`window`, `engine`: the steps between two log lines, and the loop · `stop`: signals · `checkpoint`, `state`: files, and
what goes into them · `runs`: them read again · `log`: what is said · `command`: a run from beginning to end.

Of pre-training: `config`, `presets`: what a run is · `pretraining`: its task · `build`: model and data of a
configuration · `optimizer`: groups and schedule · `masks` · `pictures` · `pretrain`, `reconstruct`, `export`: the
commands.
"""
