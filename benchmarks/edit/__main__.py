"""`python -m benchmarks.edit`; its flags are in `command`."""

from benchmarks.edit.command import main

if __name__ == "__main__":
    main()
