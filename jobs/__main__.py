"""python -m jobs: lists the commands, or runs one of them, as `grurcn` does."""

from jobs.commands import main

if __name__ == "__main__":
    main()
