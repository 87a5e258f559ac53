"""Trains the two frozen models of the premise (E6), data/models/: some twenty
minutes on one core.

.venv/bin/python data/build_premise.py
"""

from companion.runs.premise import make_base
from companion.runs.run import OWN

if __name__ == "__main__":
    for name, folder in OWN.items():
        make_base(name, folder)
        print(folder)
