"""A training, whatever is trained: what `sgmim-fast pretrain` and `sgmim-fast finetune` share.

`task`: what a training has of its own · `settings`: a configuration from presets, files and options · `command`: a run
from beginning to end · `launch`: its processes, the lock of its folder, and signals · `trainer`: the loop · `loader`:
which images it has · `checkpoint` · `log`.
"""
