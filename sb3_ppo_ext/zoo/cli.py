"""The command ``sb3-ppo-ext``: rl_zoo3's commands with our algorithms, and our own commands, such as ``study``."""

import difflib
import os
import shutil
import sys
from pathlib import Path

import sb3_ppo_ext
from sb3_ppo_ext.zoo.commands import COMMANDS, run_command
from sb3_ppo_ext.zoo.doctor import run_doctor_command
from sb3_ppo_ext.zoo.interrupts import INTERRUPTED, Interrupts
from sb3_ppo_ext.zoo.registration import ALGORITHMS, register

# Our own commands.
_STUDY = "study"
_DOCTOR = "doctor"
_PLOTS = "plots"
_ALL = (*COMMANDS, _STUDY, _DOCTOR, _PLOTS)

_HELP = f"""usage: sb3-ppo-ext [-h] [--version] <command> ...

rl_zoo3's commands, which also know {", ".join(ALGORITHMS)}.

{chr(10).join(f"  {command:<16} {what}" for command, what in COMMANDS.items())}

and commands of this package:

  {_STUDY:<16} search hyper-parameters with several processes, report, retrain the best trials, write one as YAML
  {_DOCTOR:<16} read the log of a training, and say what looks wrong and what to change first
  {_PLOTS:<16} draw what one update does to a saved model: which samples still learn, and which are cut

`sb3-ppo-ext <command> --help` lists a command's flags."""


def main() -> int:
    """
    Run the command in ``sys.argv``.

    :return: the exit code
    """
    script, *arguments = sys.argv
    command = arguments.pop(0) if arguments else ""
    if command in ("-h", "--help"):
        print(_HELP)
        return 0
    if command == "--version":
        print(f"sb3-ppo-ext {sb3_ppo_ext.__version__}")
        return 0
    if command not in _ALL:
        if command:
            nearest = difflib.get_close_matches(command, _ALL, n=1, cutoff=0.0)[0]
            print(f"sb3-ppo-ext: there is no command '{command}'; the nearest is '{nearest}'\n", file=sys.stderr)
        print(_HELP, file=sys.stderr)
        return 2

    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that the user's modules can be imported
    register()
    program = _program(script)
    interrupts = Interrupts()
    with interrupts.handled():
        try:
            if command == _STUDY:
                from sb3_ppo_ext.zoo.study.commands import run_study_command  # its imports are slow

                return run_study_command(arguments, program, main)
            if command == _DOCTOR:
                return run_doctor_command(arguments)
            if command == _PLOTS:
                from sb3_ppo_ext.zoo.plots import run_plots_command  # these too

                return run_plots_command(arguments)
            return run_command(command, arguments, program, interrupts)
        except KeyboardInterrupt:
            print(f"sb3-ppo-ext {command}: ended by Ctrl-C", file=sys.stderr)
            return INTERRUPTED


def _program(script: str) -> list[str]:
    """
    The command that starts this program again.

    :param script: the program, as it was started
    """
    if Path(script).stem != "sb3-ppo-ext":
        return [sys.executable, "-m", "sb3_ppo_ext.zoo"]
    on_path = shutil.which("sb3-ppo-ext")
    return ["sb3-ppo-ext"] if on_path is not None and Path(on_path).resolve() == Path(script).resolve() else [script]
