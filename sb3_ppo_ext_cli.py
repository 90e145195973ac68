"""
How the command ``sb3-ppo-ext`` begins and ends. A module beside the package, which is imported before it: the package
takes seconds to import, may lack what ``[zoo]`` adds, and can be interrupted.
"""

import os
import signal
import sys


def main() -> int:
    """
    :return: the exit code
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in a background process of a script
        # An exception would be a traceback out of the middle of an import.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        from sb3_ppo_ext.zoo.cli import main as command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sb3_ppo_ext"):
            raise
        print(f'sb3-ppo-ext: {error.name} is missing: pip install "sb3-ppo-ext[zoo]"', file=sys.stderr)
        return 1
    code = command()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is printed and saved
    return code


if __name__ == "__main__":
    sys.exit(main())
