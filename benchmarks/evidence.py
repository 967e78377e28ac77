"""`python benchmarks/evidence.py`: whether guidance helps. `evidence/run.py` has its options."""

from evidence.run import main

if __name__ == "__main__":
    main()
