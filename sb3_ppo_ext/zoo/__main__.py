"""``python -m sb3_ppo_ext.zoo``: the same as the command ``sb3-ppo-ext``."""

import sys

from sb3_ppo_ext_cli import main

if __name__ == "__main__":
    sys.exit(main())
