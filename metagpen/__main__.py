"""`python -m metagpen` is the `metagpen` command."""

from .cli import main

if __name__ == "__main__":
    main()
