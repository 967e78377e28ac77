"""Measures whether guidance helps: small encoders from scratch, with SimMIM and with SG-MIM. EVIDENCE.md has results.

`scenes`: data · `pretrain`: short pre-training · `probe`: frozen and fine-tuned features · `real`: a photograph ·
`report`: tables and the figure · `run`: the command, `python benchmarks/evidence.py`.
"""
