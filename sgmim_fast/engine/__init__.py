"""The training engine that `sgmim-fast pretrain` and `sgmim-fast finetune` share.

`task`: the interface that a kind of training implements · `settings`: configurations from presets, files and options ·
`command`: the command-line interface · `launch`: processes, lock and signals · `trainer`: the training loop ·
`loader`: batches · `average`: moving averages of parameters · `checkpoint` · `log`.
"""
