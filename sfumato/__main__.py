"""python -m sfumato, and the command `sfumato`."""

import sys


def main() -> int:
    """Run the command line; 130 if it is interrupted, also while its modules are imported."""
    try:
        from sfumato.cli import main as command

        code = command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    # Python recalls an interrupt within an `exec`, as dataclasses do, until the next one: it would end by it.
    exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
