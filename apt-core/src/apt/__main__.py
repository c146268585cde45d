"""``python -m apt`` is ``apt-core``."""

from apt.cli import enter

if __name__ == "__main__":
    enter()
