"""`python benchmarks/evidence.py`: measures whether guidance helps. `evidence/run.py` documents the options."""

from evidence.run import main

if __name__ == "__main__":
    main()
