"""A training, whatever is trained: what `sgmim-fast pretrain` and `sgmim-fast finetune` share.

`task`: what a training has of its own · `settings`: a configuration from presets, files and options · `command`: a run
from beginning to end · `launch`: its processes, and signals · `lock`: one run in a folder · `trainer`: the loop ·
`step`: one optimizer step · `loader`: which images it has · `checkpoint` · `log`.
"""
