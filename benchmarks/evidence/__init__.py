"""Whether guidance helps: small encoders from scratch, with SimMIM and with SG-MIM. EVIDENCE.md has what came out.

`scenes`: data · `pretrain`, `probe`, `real`: what is trained on them and measured · `report`: tables and the picture ·
`run`: the command, `python benchmarks/evidence.py`.
"""
