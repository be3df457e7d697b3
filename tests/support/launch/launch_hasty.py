"""The launch command, which gives a cluster that does not come back a fraction of its deadline."""

from lockstep.launch import cli
from lockstep.launch.run import supervisor

from .launch_dummies import hasty

if __name__ == "__main__":
    supervisor.Replacements = hasty  # type: ignore[assignment, misc]
    cli.main()
