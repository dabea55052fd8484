"""Trains in processes that it starts: by subprocess, and by multiprocessing."""

import multiprocessing
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


def train():
    import by_keyword

    by_keyword.main()


def main():
    if sys.argv[1] == "subprocess":
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "by_keyword.py")
        subprocess.run([sys.executable, *sys.argv[2:], script], check=True)
    else:
        child = multiprocessing.get_context(sys.argv[1]).Process(target=train)
        child.start()
        child.join()


if __name__ == "__main__":
    main()
