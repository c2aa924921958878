"""Train and evaluate a sequential recommender: python run_recbole_cce.py --help"""

from recbole_cce.cli import main

if __name__ == "__main__":
    main()
