"""`python -m memphi`: the command, also where its script is not on the path."""

from memphi.cli import main

if __name__ == "__main__":
    main()
