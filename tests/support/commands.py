"""Command lines one after another, their stages too, in this one process, which loads torch once.

Reads a JSON list of command lines, prints a JSON list of what each printed. Each must succeed.
"""

import json
import sys

from kit import stillroom

if __name__ == "__main__":
    printed = [stillroom(*words).stdout for words in json.load(sys.stdin)]
    sys.stdout.write(json.dumps(printed) + "\n")
