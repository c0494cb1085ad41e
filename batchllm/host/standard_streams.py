"""File descriptors 0, 1 and 2 of this process, which whoever started it may have closed.

Knows numbers of files only. It imports nothing that takes time: a command calls it first of all.
"""

from __future__ import annotations

import os


def reserve() -> None:
    """Have all three be something: nothing is read from those that were closed, and what is written there goes nowhere.

    Else the next file or socket would get the number: a library that prints would print to it, and a process that is
    started would not get it, since its own standard streams take the place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)
