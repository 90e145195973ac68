"""``python -m sb3_ppo_ext.zoo``: the same as the command ``sb3-ppo-ext``."""

import signal
import sys

from sb3_ppo_ext.zoo.cli import main

if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is printed and saved by now
    sys.exit(code)
