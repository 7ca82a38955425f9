"""The `metagpen` command, also as `python -m metagpen`."""

import sys


def main() -> None:
    try:
        from .cli import main as command

        command()
    except KeyboardInterrupt:  # while the command was being imported; later on it says so itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
